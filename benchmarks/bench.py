"""`make bench`: how fast is fine-tuning, against PEFT and against the products that no step can avoid.

Every row is measured in a process of its own (the allocator's settings are the process's), the processes take turns, and a
row keeps all its values: the book shows medians and ranges. Let nothing else run. Rows go to `tiny_llm/assets/bench_log.jsonl`,
which nbs/further/07_speed.ipynb prints. `--quick` runs each worker once with few steps, to see whether the program works.
"""
import argparse, copy, json, platform, random, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median
import torch, torch.nn.functional as F
from tiny_llm import fast
from tiny_llm.adapter import load_adapter, merge_lora, swap_adapter
from tiny_llm.data import ASSETS, bundled_stories
from tiny_llm.files import read_jsonl, write_jsonl
from tiny_llm.finetune import TASKS, encoded_batches, example_loss, lr_scale
from tiny_llm.generate import generate_ids, load_base
from tiny_llm.gpt import GPT, GPTConfig
from tiny_llm.instruct import IGNORE, collate, encode_examples
from tiny_llm.lora import add_lora_to_model, lora_modules
from tiny_llm.train import autocast, has_bf16, train_step

TARGETS, BATCH, STORIES = ("attn.qkv", "attn.W_o"), 8, Path(__file__).resolve().parents[2]/"shared"/"tinystories"
VARIANTS = ("peft plain", "peft tuned", "peft tuned, allocator", "ours", "full plain", "full ours")
BOTH = ("peft plain", "peft tuned", "ours")
ADAPTERS, LONGEST = ASSETS/"adapters", 512 # tokens: the base's longest sequence

# -- what all workers share ------------------------------------------------------------------------------

def long_stories(tok, n=200):
    "The longest real stories of the first megabyte, every token a label; None where the text is not at hand."
    files = sorted(STORIES.glob("valid*.txt"))
    if not files: return None
    with open(files[0], encoding="utf-8") as f: texts = f.read(1_000_000).split("<|endoftext|>")[:-1]
    ids = [[tok.eot, *tok.encode(t.strip()), tok.eot][:LONGEST] for t in sorted(texts, key=len)[-n:]]
    return [(i, list(i)) for i in ids]

def examples(task, tok):
    "(training examples, held-out ones), encoded; None where they are not at hand."
    if task == "stories":
        some = long_stories(tok)
        return some and (some[::2], some[1:32:2])
    return tuple(encode_examples(TASKS[task](bundled_stories(s)), tok, 288, True) for s in ("train", "valid"))

def batches_of(encoded, tok, bucketed):
    "All batches of an epoch: of similar length, or as they come, each padded to its longest."
    if bucketed: return encoded_batches(encoded, BATCH, tok.pad)
    mixed = random.Random(0).sample(encoded, len(encoded))
    return [collate(mixed[i:i + BATCH], tok.pad) for i in range(0, len(mixed), BATCH)]

def seconds(f):
    start = time.perf_counter(); f()
    return time.perf_counter() - start

def with_ours(model):
    torch.manual_seed(0)
    return add_lora_to_model(model, 8, 16, TARGETS)

def with_peft(model):
    "The same adapters, made by PEFT, which start from the same A."
    from peft import LoraConfig, inject_adapter_in_model
    ours = with_ours(copy.deepcopy(model))
    theirs = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS)), model)
    with torch.no_grad():
        for name, m in lora_modules(ours).items(): theirs.get_submodule(name).lora_A["default"].weight.copy_(m.A)
    return theirs

def status(field):
    "Megabytes of this process, as the kernel counts them; 0 where it is no Linux."
    try: return next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith(field))
    except OSError: return 0.0

def forget_peak():
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass

def plain_loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE)

def fp32_step(model, opts, x, y, lr):
    "The straightforward loop: no autocast, all logits."
    plain_loss(model, x, y).backward()
    torch.nn.utils.clip_grad_norm_([p for g in opts[0].param_groups for p in g["params"]], 1.0)
    opts[0].param_groups[0]["lr"] = lr
    opts[0].step(); opts[0].zero_grad()

# -- training --------------------------------------------------------------------------------------------

def prepared(variant):
    "(model, tokenizer, step function, learning rate) of a variant."
    model, tok = load_base() # on the GPU where there is one
    lr = 5e-3
    if variant.startswith("peft"): model = with_peft(model)
    elif variant == "ours": model = with_ours(model)
    else: model, lr = model.requires_grad_(True), 5e-4
    if "allocator" in variant: fast.keep_memory() # `FastLoss` does it for ours
    step = fp32_step if variant.endswith("plain") else train_step
    if "ours" in variant:
        loss_of = fast.FastLoss(model)
        step = lambda *args: train_step(*args, loss_of=loss_of)
    return model, tok, step, lr

def train(variant, task, steps, every):
    "Train; a row of times, memory and held-out losses."
    model, tok, step, lr = prepared(variant)
    some = examples(task, tok)
    if some is None: return None
    batches, held_out = batches_of(some[0], tok, not variant.endswith("plain")), encoded_batches(some[1], BATCH, tok.pad)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    at, times, curve, seen = next(model.parameters()).device, [], [], 0
    before = status("VmRSS"); forget_peak()
    for i in range(steps):
        x, y = (t.to(at) for t in batches[i % len(batches)])
        times.append(seconds(lambda: step(model.train(), [opt], x, y, lr * lr_scale(i, steps)))); seen += len(x)
        if i == 2: peak = status("VmHWM") - before
        if every and (i + 1) % every == 0: curve.append((sum(times), example_loss(model, held_out)))
    return dict(ms=1e3 * median(times[1:]), examples_per_s=(seen - BATCH) / sum(times[1:]), peak_mb=peak, curve=curve)

def floor(task, rounds=3):
    "Milliseconds of the bare products of a mean step: frozen layers on every token, the head on the labels."
    fast.keep_memory()
    model, tok = load_base()
    some = examples(task, tok)
    if some is None: return None
    batches = batches_of(some[0], tok, True)
    dtype = torch.bfloat16 if has_bf16("cpu") else torch.float32
    layers = [m.weight.detach().to(dtype) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    head = model.lm_head.weight.detach().to(dtype)
    times = []
    for x, y in batches[:rounds] * 2:
        real, labels = int((x != tok.pad).sum()), int((y != IGNORE).sum())
        jobs = [(W, torch.randn(real, W.shape[1], dtype=dtype), torch.randn(real, W.shape[0], dtype=dtype)) for W in layers]
        h, dz = torch.randn(labels, head.shape[1], dtype=dtype), torch.randn(labels, head.shape[0], dtype=dtype)
        def products():
            for W, a, _ in jobs: a @ W.T
            h @ head.T, dz @ head
            for W, _, d in jobs[1:]: d @ W # none below the lowest adapter
        times.append(seconds(products))
    return dict(ms=1e3 * median(times))

# -- what each step of the chapter brings ------------------------------------------------------------------

def plain_product(layer, x, weights): return layer(x)
def plain_norm(m, x): return m(x)
class PlainGate: apply = staticmethod(lambda g, u: F.silu(g) * u)
class PlainHead: apply = staticmethod(lambda h, W, y: F.cross_entropy(h @ W.T, y))
ABLATION = [("plain", {}), ("batches of like length", {}), ("memory that stays", {}), ("logits at labels, last rows", dict(product=plain_product, norm=plain_norm, Gate=PlainGate, HeadLoss=PlainHead)),
            ("head in chunks", dict(product=plain_product, norm=plain_norm, Gate=PlainGate)), ("norm and gate", dict(product=plain_product)), ("adapted product", {})]

def autocast_loss(model, x, y):
    with autocast(x.device): return plain_loss(model, x, y)

def ablation(task, step, n=3):
    "Milliseconds of forward and backward with the steps of the chapter up to this one."
    names = [name for name, _ in ABLATION]
    at, (_, plain) = names.index(step), ABLATION[names.index(step)]
    if at >= 2: fast.keep_memory()
    for name, stand_in in plain.items(): setattr(fast, name, stand_in)
    model, tok = load_base()
    model = with_ours(model).train()
    batches = batches_of(examples(task, tok)[0], tok, at >= 1)[:n]
    loss_of = fast.FastLoss(model) if at >= 3 else lambda x, y: autocast_loss(model, x, y)
    times = [seconds(lambda: loss_of(x, y).backward()) for x, y in batches[:1] + batches]
    return dict(ms=1e3 * sum(times[1:]) / n)

PARTS = {"matrix products": ("aten::mm", "aten::addmm"), "attention": ("flash_attention", "scaled_dot_product"),
         "copies and concatenation": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_")}

def profile(task, n=4):
    "Rows of the share of each kind of operation in forward and backward of `ours`, percent of the time in all operations."
    from torch.profiler import ProfilerActivity, profile as record
    model, tok = load_base()
    loss_of, batches = fast.FastLoss(with_ours(model).train()), batches_of(examples(task, tok)[0], tok, True)[:n]
    loss_of(*batches[0]).backward()
    with record(activities=[ProfilerActivity.CPU]) as p: [loss_of(x, y).backward() for x, y in batches]
    spent = {k: 0.0 for k in (*PARTS, "everything else")}
    for e in p.key_averages():
        part = next((k for k, names in PARTS.items() if any(n in e.key for n in names)), "everything else")
        spent[part] += e.self_cpu_time_total
    return [dict(kind="profile", task=task, operations=k, percent=100 * v / sum(spent.values())) for k, v in spent.items()]

# -- how cost grows ------------------------------------------------------------------------------------------

def step_ms(config, B, T, r, blocks=None, n=3):
    "Forward and backward of one batch with adapters on the last `blocks` blocks."
    targets = [f"blocks.{i}.{t}" for i in range(config.n_layers - (blocks or config.n_layers), config.n_layers) for t in TARGETS]
    model = add_lora_to_model(GPT(config), r, 16, targets)
    loss_of, x = fast.FastLoss(model), torch.randint(0, config.vocab_size, (B, T))
    return [1e3 * seconds(lambda: loss_of(x, x).backward()) for _ in range(n + 1)][1:]

def growth():
    "Rows of step times with one thing changed at a time."
    base = GPTConfig()
    def wide(d): return GPTConfig(d_model=d, n_heads=d // 32, d_mlp=d * 43 // 16, n_layers=2)
    runs = [("tokens in a batch", B * 128, (base, B, 128, 8)) for B in (2, 4, 8, 16)]
    runs += [("rank", r, (base, 8, 128, r)) for r in (1, 4, 16, 64, 128)]
    runs += [("d_model (2 blocks)", d, (wide(d), 4, 128, 8)) for d in (128, 256, 512, 1024)]
    runs += [("adapted blocks, from the top", b, (base, 8, 128, 8, b)) for b in (1, 2, 4, 6)]
    return [dict(kind="growth", what=what, value=v, ms=step_ms(*args)) for what, v, args in runs]

# -- generation, swap, merge, import ---------------------------------------------------------------------------

def generators(folder):
    "name -> function of ids that writes 64 tokens, greedily, whatever comes."
    from transformers import AutoModelForCausalLM
    from tiny_llm.hf import export_base
    base, tok = load_base()
    export_base(base, tok, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapted = load_adapter(load_base()[0], ADAPTERS/"instruct").eval()
    merged = merge_lora(load_adapter(load_base()[0], ADAPTERS/"instruct")).eval()
    own = lambda m: lambda ids: generate_ids(m, ids, torch.ones_like(ids, dtype=torch.bool), -1, 64, temperature=0) # no token ends it
    with_hf = lambda ids: theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=tok.pad)
    return {"base": own(base), "adapter": own(adapted), "merged": own(merged), "transformers": with_hf}, tok

def generation(rounds=5):
    "Tokens per second, the four in turn."
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        fs, tok = generators(folder)
        prompt = [tok.eot, *tok.encode("Once upon a time there was a little")]
        for B in (1, 16):
            ids, speeds = torch.tensor([prompt] * B), {k: [] for k in fs}
            for i in range(rounds + 1):
                for k, f in fs.items():
                    s = B * 64 / seconds(lambda: f(ids))
                    if i: speeds[k].append(s)
            rows += [dict(kind="other", what=f"generate: {k}", batch=B, values=v, unit="tokens/s") for k, v in speeds.items()]
    return rows

def swaps(rounds=7):
    "Milliseconds to load, swap, and merge an adapter."
    model = load_adapter(load_base()[0], ADAPTERS/"instruct")
    swap = [1e3 * seconds(lambda: swap_adapter(model, ADAPTERS/("moral", "instruct")[i % 2])) for i in range(rounds)]
    merge = [1e3 * seconds(lambda m=copy.deepcopy(model): merge_lora(m)) for _ in range(rounds)]
    return [dict(kind="other", what=what, batch=None, values=v, unit="ms") for what, v in (("swap an adapter", swap), ("merge an adapter", merge))]

# -- the driver ------------------------------------------------------------------------------------------

IMPORT = "import time, torch; t = time.perf_counter(); import tiny_llm.lora; print(1e3 * (time.perf_counter() - t))"

def worker(what, **args):
    "Run a function of this file in a process of its own; its result."
    p = subprocess.run([sys.executable, __file__, "--worker", json.dumps([what, args])], capture_output=True, text=True)
    if p.returncode: sys.exit(f"{what} {args} failed:\n{p.stderr[-3000:]}")
    return json.loads(p.stdout.splitlines()[-1])

def training_rows(task, variants, steps, rounds):
    "A long run of each variant, then short ones in turn; the floor is measured in every round, too."
    long = {v: worker("train", variant=v, task=task, steps=steps, every=10) for v in variants}
    if None in long.values(): print(f"{task}: no examples at hand, skipped"); return []
    floors, short = [], {v: [] for v in variants}
    for _ in range(rounds):
        floors.append(worker("floor", task=task)["ms"])
        for v in variants: short[v].append(worker("train", variant=v, task=task, steps=4, every=0))
    goal = max(r["curve"][-1][1] for v, r in long.items() if not v.startswith("full"))
    rows = []
    for v in variants:
        runs = [long[v], *short[v]]
        rows.append(dict(kind="train", task=task, variant=v, steps=steps, examples_per_s=[r["examples_per_s"] for r in runs], ms=[r["ms"] for r in runs],
            peak_mb=[r["peak_mb"] for r in runs], floor_ms=floors, step_over_floor=median(r["ms"] for r in runs) / median(floors), valid_loss=long[v]["curve"][-1][1],
            seconds_to=next((s for s, loss in long[v]["curve"] if loss <= goal), None), goal=goal))
        print(f"{task} {v}: {median(rows[-1]['examples_per_s']):.1f} examples/s, {rows[-1]['step_over_floor']:.2f} x floor, loss {rows[-1]['valid_loss']:.3f}", flush=True)
    return rows

def ablation_rows(task, rounds):
    "The steps of the chapter in turn."
    ms = {name: [] for name, _ in ABLATION}
    for _ in range(rounds):
        for name in ms: ms[name].append(worker("ablation", task=task, step=name)["ms"])
    floor_ms = worker("floor", task=task)["ms"]
    return [dict(kind="ablation", task=task, step=k, ms=v, floor_ms=floor_ms) for k, v in ms.items()]

def machine():
    name = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    return dict(kind="machine", processor=name, threads=torch.get_num_threads(), bf16=has_bf16("cpu"), gpu=torch.cuda.is_available(), torch=torch.__version__)

def import_rows():
    "What our import adds to that of torch."
    values = [float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    return [dict(kind="other", what="import tiny_llm.lora", batch=None, values=values, unit="ms")]

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=ASSETS/"bench_log.jsonl")
    p.add_argument("--quick", action="store_true", help="few steps, one round")
    p.add_argument("--only", nargs="+", metavar="PART", help="measure these parts again, keep the other rows")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        what, how = json.loads(args.worker)
        return print(json.dumps(globals()[what](**how)))
    steps, rounds = (10, 1) if args.quick else (20, 2)
    parts = dict(machine=lambda: [machine()], instruct=lambda: training_rows("instruct", VARIANTS, steps, rounds), moral=lambda: training_rows("moral", BOTH, steps, rounds),
                 stories=lambda: training_rows("stories", BOTH, 10, rounds), ablation=lambda: ablation_rows("instruct", rounds) + ablation_rows("moral", rounds),
                 profile=lambda: worker("profile", task="instruct") + worker("profile", task="moral"), growth=lambda: worker("growth"),
                 generation=lambda: worker("generation"), swaps=lambda: worker("swaps"), imports=import_rows)
    done = read_jsonl(args.out) if args.only else []
    for name in ["machine", *args.only] if args.only else parts:
        done = [r for r in done if r["part"] != name] + [dict(r, part=name) for r in parts[name]()]
        write_jsonl(args.out, sorted(done, key=lambda r: list(parts).index(r["part"])))
    print(f"{len(done)} rows in {args.out}")

if __name__ == "__main__": main()
