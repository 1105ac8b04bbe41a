"""Nothing lost: killed at any moment, or on a full disk, a folder holds the old or the new, whole, and never less than the last
save that came to its end.

Children do the saving. They come from a fork server that has imported everything, so that sixty kills cost seconds. A child adds
a byte to a file after each save: how long that file is when the child is dead says which save is the last that may not be lost.
"""
import json, multiprocessing, os, random, resource, shutil, signal, subprocess, time
from contextlib import contextmanager
import pytest, torch
from tiny_llm.adapter import adapter_config, adapter_tensors, load_adapter, save_adapter
from tiny_llm.finetune import FinetuneResult, finetune, load_finetune_state, save_finetune_state
from tiny_llm.gpt import GPT, GPTConfig, load_checkpoint, save_checkpoint
from tiny_llm.lora import add_lora_to_model, lora_parameters

ctx = multiprocessing.get_context("forkserver")
ctx.set_forkserver_preload(["pytest", "torch._dynamo", "tiny_llm.finetune"])
pytestmark = pytest.mark.usefixtures("one_thread")

# What is saved. Save number n writes one of two very different things, marked with n, so that every save is told from every other.

def base(**how):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**dict(vocab_size=97, max_seq_len=64, d_model=64, n_heads=4, n_layers=2, d_mlp=96), **how})).eval()

class Adapter:
    name = "adapter"
    def __init__(self):
        self.models = [add_lora_to_model(base(), r=16, alpha=8, targets="all-linear"), add_lora_to_model(base(), r=4, alpha=32)]
        for m in self.models: torch.nn.init.normal_(lora_parameters(m)[1])
    def nth(self, n):
        m = self.models[n % 2]
        with torch.no_grad(): lora_parameters(m)[0][0, 0] = n
        return m
    def save(self, n, path): save_adapter(self.nth(n), path)
    def picture(self, m): return adapter_config(m), {k: t.numpy().tobytes() for k, t in adapter_tensors(m).items()}
    def expected(self, n): return self.picture(self.nth(n))
    def found(self, path): return self.picture(load_adapter(base(), path))

class Checkpoint(Adapter):
    name = "model.safetensors"
    def __init__(self): self.models = [base(), base(n_layers=3, tie_weights=False)]
    def nth(self, n):
        with torch.no_grad(): self.models[n % 2].norm_f.weight[0] = n
        return self.models[n % 2]
    def save(self, n, path): save_checkpoint(self.nth(n), path)
    def picture(self, m): return m.config, {k: t.numpy().tobytes() for k, t in m.state_dict().items()}
    def found(self, path): return self.picture(load_checkpoint(path))

class State(Adapter):
    name, run = "state.pt", dict(lr=1e-3, layers="some")
    def __init__(self):
        self.result = FinetuneResult(add_lora_to_model(base(), r=16, targets="all-linear"))
        self.opt = torch.optim.AdamW(lora_parameters(self.result.model))
        for p in lora_parameters(self.result.model): p.grad = torch.full_like(p, 0.5)
        self.opt.step()
    def nth(self, n): # losses say which; the optimizer's memory and the random numbers go along
        with torch.no_grad():
            for p in lora_parameters(self.result.model): p.fill_(n)
            for s in self.opt.state.values(): s["exp_avg"].fill_(n)
        torch.manual_seed(n)
        self.result.losses, self.result.tokens = [1.0] * (n % 50), n
    def picture(self):
        return (self.result.losses, self.result.tokens, torch.get_rng_state().tolist(),
                [t.detach().clone().numpy().tobytes() for p in lora_parameters(self.result.model) for t in (p, self.opt.state[p]["exp_avg"])])
    def save(self, n, path): self.nth(n); save_finetune_state(path, self.result, self.opt, self.run)
    def expected(self, n): self.nth(n); return self.picture()
    def found(self, path): self.nth(0); load_finetune_state(path, self.result, self.opt, self.run); return self.picture()

KINDS = {"adapter": Adapter, "checkpoint": Checkpoint, "state of a run": State}

# Killed while saving

def save_for_ever(kind, path, first, diary):
    "The child: a byte when it is ready, and one after each save."
    torch.set_num_threads(1)
    thing, fd = KINDS[kind](), os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, b".")
    for n in range(first, 10**9):
        thing.save(n, path)
        os.write(fd, b".")

def wait_for(diary, size, child):
    while not diary.exists() or diary.stat().st_size < size:
        assert child.is_alive(), "the child ended before it could be killed"
        time.sleep(0.0005)

def kill(child):
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL, "the child did not die of the kill"

@pytest.mark.parametrize("kind, kills", [("adapter", 60), ("checkpoint", 20), ("state of a run", 20)])
def test_killed_while_saving(tmp_path, record, kind, kills):
    thing, rng = KINDS[kind](), random.Random(kind)
    folder = tmp_path/"f"; path = folder if kind == "adapter" else folder/thing.name
    began = time.perf_counter()
    for n in range(4): thing.save(n, path)
    one_save, inside, lost, acknowledged = (time.perf_counter() - began) / 4, 0, [], 3
    for i in range(20 * kills):
        if i >= kills and inside >= kills // 10: break # on some machines few kills hit a save; then there are more of them
        child, diary = ctx.Process(target=save_for_ever, args=(kind, path, acknowledged + 1, tmp_path/f"diary{i}")), tmp_path/f"diary{i}"
        child.start(); wait_for(diary, 2, child) # its first save is slow, and is over
        time.sleep(rng.uniform(0, 1.2 * one_save)); kill(child)
        acknowledged += diary.stat().st_size - 1
        now = [p.name for p in folder.iterdir()]
        inside += ".new" in now or any(f".{child.pid}.tmp" in name for name in now)
        found = thing.found(path)
        if found == thing.expected(acknowledged + 1): acknowledged += 1 # it had happened, the child died before it could say so
        elif found != thing.expected(acknowledged): lost.append((i, acknowledged, now))
    assert not lost and inside >= kills // 10, (lost, inside)
    thing.save(0, path) # whatever was left there is no hindrance
    assert thing.found(path) == thing.expected(0)
    record("fault", f"{kind}, killed while saving", tried=kills, lost=len(lost))

# A full disk

@contextmanager
def files_end_at(size):
    "No file can grow beyond `size`; a write that would make it fails."
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

@contextmanager
def disk_with(size, ballast):
    "A small disk with `size` bytes left."
    s = os.statvfs(ballast.parent)
    ballast.write_bytes(bytes(s.f_bavail * s.f_frsize - size))
    try: yield
    finally: ballast.unlink()

def save_without_room(kind, folder, limits, ballast, diary):
    "The child: save number 1 over number 0 under each limit, and write down how that ended."
    thing, rows = KINDS[kind](), []
    path, old = folder if kind == "adapter" else folder/thing.name, thing.expected(0)
    thing.save(0, path)
    there = sorted(os.listdir(folder))
    for size in limits:
        with disk_with(size, ballast) if ballast else files_end_at(size):
            try: thing.save(1, path); how = "saved"
            except OSError: how = "OSError"
            except BaseException as e: how = repr(e)[:200]
        whole = thing.found(path) == (thing.expected(1) if how == "saved" else old)
        rows.append((size, how, whole, sorted(os.listdir(folder)) == there))
        diary.write_text(json.dumps(rows))
        thing.save(0, path)

def try_limits(kind, tmp_path, folder, limits, ballast=None):
    child = ctx.Process(target=save_without_room, args=(kind, folder, limits, ballast, tmp_path/"rows.json"))
    child.start(); child.join(60)
    rows = json.loads((tmp_path/"rows.json").read_text())
    assert child.exitcode == 0, f"died with {child.exitcode} after {rows[-1:]}"
    assert len(rows) == len(limits) and not [r for r in rows if r[1] not in ("saved", "OSError") or not (r[2] and r[3])], rows
    assert rows[-1][1] == "saved" and rows[0][1] == "OSError"
    return rows

def size_of(kind, tmp_path):
    "(largest, all) files of save number 1, bytes."
    thing = KINDS[kind](); thing.save(1, tmp_path/"measure" if kind == "adapter" else tmp_path/"measure"/thing.name)
    sizes = [p.stat().st_size for p in (tmp_path/"measure").iterdir()]
    return max(sizes), sum(sizes)

@pytest.mark.parametrize("kind", KINDS)
def test_files_that_cannot_grow(tmp_path, record, kind):
    largest, _ = size_of(kind, tmp_path)
    (tmp_path/"f").mkdir()
    limits = [largest * i // 40 for i in range(40)] + [largest - 1, largest]
    rows = try_limits(kind, tmp_path, tmp_path/"f", limits)
    assert [how for _, how, *_ in rows] == ["OSError"] * (len(rows) - 1) + ["saved"]
    record("fault", f"{kind}, saved where files cannot grow beyond a size", tried=len(rows), lost=0)

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 2 MB in memory. Only root may make one."
    (disk := tmp_path/"disk").mkdir()
    made = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if not made or made.returncode: pytest.skip("no right to mount a small disk: " + (made.stderr.decode().strip() if made else "no mount"))
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)

@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk(tmp_path, small_disk, kind):
    "The same with a real disk that is full (ENOSPC). Not in the record: not every machine lets a test make a disk."
    (small_disk/"f").mkdir()
    total = size_of(kind, tmp_path)[1]
    step = max(4096, total // 20 // 4096 * 4096) # a disk gives whole blocks
    rows = try_limits(kind, tmp_path, small_disk/"f", [*range(0, total, step), total + 5 * 4096], small_disk/"ballast")
    assert sum(how == "OSError" for _, how, *_ in rows) >= len(rows) // 2

# A run that is killed again and again

ANIMALS = "fox bear cat dog hen cow pig bee owl ant".split()
DATA = [f"[INST] Tell me about the {a}.[/INST] The {a} was happy." for a in ANIMALS]
SETTINGS = dict(max_steps=48, eval_every=3, batch_size=2, lr=5e-3)

def tune(ckpt, out, last=None, diary=os.devnull):
    "The child: go on with the run; a line for each step; at step `last` it kills itself."
    torch.set_num_threads(1)
    def callback(step, loss):
        with open(diary, "a") as f: f.write(f"{step}\n")
        if step == last: os.kill(os.getpid(), signal.SIGKILL)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2) # the progress bar
        result = finetune(ckpt, DATA, DATA[:3], out, callback=callback, **SETTINGS)
    torch.save((result.losses, result.valid_losses, result.tokens), f"{out}.numbers")

def test_a_run_that_is_killed_again_and_again(tmp_path, record):
    "At random steps, and in between at random times, wherever the run is then: in a step, validating, saving, or loading the base."
    torch.manual_seed(0)
    save_checkpoint(GPT(GPTConfig(d_model=32, n_heads=2, n_layers=2, d_mlp=48, dropout=0.1)), tmp_path/"base.safetensors")
    rng, steps = random.Random(1), iter(sorted(random.Random(0).sample(range(2, SETTINGS["max_steps"]), 10)))
    def start(out, *how):
        child = ctx.Process(target=tune, args=(tmp_path/"base.safetensors", tmp_path/out, *how)); child.start()
        return child
    whole, reached = start("whole"), 0
    for i in range(20):
        diary = tmp_path/f"diary{i}"
        if i % 2:
            child = start("killed", None, diary)
            if i % 4 == 1: wait_for(diary, 1, child)
            time.sleep(rng.uniform(0, 0.03)); kill(child)
        else:
            child = start("killed", max(next(steps), reached + 1), diary); child.join()
            assert child.exitcode == -signal.SIGKILL
        done = [int(n) for n in diary.read_text().split()] if diary.exists() else []
        assert not done or reached - 3 <= done[0] - 1, (done[0], reached) # it began where the last state was, no earlier
        assert done == list(range(done[0], done[-1] + 1)) if done else True
        reached = max([reached, *done])
    for child in (whole, start("killed")): child.join(); assert child.exitcode == 0
    read = lambda out: {k: t.numpy().tobytes() for k, t in adapter_tensors(load_adapter(load_checkpoint(tmp_path/"base.safetensors"), tmp_path/out)).items()}
    assert read("killed") == read("whole") and torch.load(tmp_path/"killed.numbers") == torch.load(tmp_path/"whole.numbers")
    assert sorted(os.listdir(tmp_path/"killed")) == ["adapter_config.json", "adapter_model.safetensors", "tiny_llm.json"]
    record("fault", "one run, killed again and again and gone on with", tried=20, lost=0)
