"""The run that made the bundled base: the loop of `tiny_llm.train`, made for hours on two cores.

    python benchmarks/pretrain.py --out DIR --text train.txt --init base.safetensors --steps 1700
    python benchmarks/pretrain.py --out NEXT --init a.safetensors --teachers a.safetensors b.safetensors
    python benchmarks/pretrain.py --out BOTH --average a.safetensors b.safetensors --scale .95

What differs from `tiny_llm.train`: each block is compiled for nine fixed shapes and multiplies in bfloat16; dropout and
token noise (inputs replaced by the padding id) fall with the learning rate; people are renamed at random within a story. With
`--teachers`, half of the loss asks for what these models give together as the next token's chances instead of the one
token that came (Timiryasov & Tastet 2023, "Baby Llama"), which is what helps where the text is small.
Killed and called again with the same arguments, it goes on from the last saved state. `--check` compares its loss and
gradients with the plain model's.
"""
import argparse, time, unicodedata
from collections import Counter
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from tiny_llm.data import ASSETS, load_ids, prepare
from tiny_llm.files import write_jsonl
from tiny_llm.gpt import GPT, apply_rope, load_checkpoint, save_checkpoint
from tiny_llm.bpe import BPETokenizer
from tiny_llm.train import PretrainConfig, make_optimizers, read_state, story_loss, write_state

WIDTHS = (96, 128, 160, 192, 224, 256, 320, 416, 512)  # T of the batches
ROWS = 2048                                            # places a chunk of the head
PAD = 1                                                # id that stands for a hidden input token
BOYS = "Tim Tom Ben Max Sam Jack Billy Bob Joe Mark Dan Leo Pete Fred Luke Harry Toby Ned Finn Peter Adam Tommy Jimmy Timmy John Mike Bobby James Johnny Jim Charlie".split()
GIRLS = "Lily Sue Mia Anna Lucy Sara Amy Jane Emma Molly Jill Ella Nina Rosie Polly Zoe Ruby Daisy Lola Bella Kate Meg Jenny Grace Susie Sally Sarah Mary Lisa Jen Tina Emily Mandy Lucy Kitty".split()


def plain(text):
    "Text without rare characters: what stands for several tokens of a byte each becomes ASCII, or goes."
    for a, b in (("\u2013", "-"), ("\u2014", "-"), ("\u2018", "'"), ("\u2026", "..."), ("\xa0", " ")): text = text.replace(a, b)
    keep = lambda c: c.isascii() or c in "\u201c\u201d\u2019"                     # these three are a token each
    return "".join(c if keep(c) else unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() for c in text)


THINGS = ["dog cat bird rabbit bear fox mouse duck frog pig horse cow lion squirrel bunny", "red blue green yellow pink black white brown",
          "ball doll car truck kite boat train", "cake cookie banana sandwich pie"]

class Renamer:
    "Another name for each boy and girl of a story, and now and then another animal, colour, toy or food, drawn by how often the training stories use it."
    def __init__(self, tok, stories):
        count = Counter(np.concatenate(stories).tolist())
        self.tables = [self._table(tok, names, ("", " "), count) for names in (BOYS, GIRLS)] + [self._table(tok, kind.split(), (" ",), count) for kind in THINGS]

    def _table(self, tok, words, before, count):
        ids = [[tok.encode(b + w) for b in before] for w in dict.fromkeys(words)]
        ids = [[f[0] for f in forms] for forms in ids if all(len(f) == 1 for f in forms)]      # words that are one token in every form
        p = np.array([sum(count[t] for t in forms) + 1.0 for forms in ids])
        return ids, p / p.sum(), {t: i for i, forms in enumerate(ids) for t in forms}, len(before) == 2

    def __call__(self, story, rng):
        "Token -> token."
        swap = {}
        for ids, p, where, named in self.tables:
            present = list(dict.fromkeys(where[t] for t in story.tolist() if t in where))
            if present and (named or rng.random() < .5):
                for old, new in zip(present, rng.choice(len(ids), len(present), replace=False, p=p)):
                    swap.update(zip(ids[old], ids[new]))
        return swap


def swapped(ids, swap):
    "`ids` with the tokens of `swap` exchanged."
    if not swap: return ids
    table = np.arange(65536, dtype=np.uint16)
    table[list(swap)] = list(swap.values())
    return table[ids].astype(ids.dtype)


class Lesson:
    "The `k` likeliest next tokens and their chances, averaged over models, at each place of each story."
    def __init__(self, path, stories, k=24):
        self.k, self.at = k, np.cumsum([0] + [min(len(s) - 1, WIDTHS[-1]) for s in stories])
        shape = (self.at[-1], k)
        path = Path(path)
        new = not path.with_suffix(".ids").exists()
        self.ids, self.p = (np.memmap(path.with_suffix(e), t, "w+" if new else "r+", shape=shape) for e, t in ((".ids", np.uint16), (".p", np.float16)))

    @torch.no_grad()
    def write(self, models, stories, room=16384):
        "Ask the models; a story whose first chance is not 0 is done already."
        order = [i for i in sorted(range(len(stories)), key=lambda i: len(stories[i])) if self.p[self.at[i], 0] == 0]
        while order:
            T = min(len(stories[order[0]]) - 1, WIDTHS[-1]) + 8
            group = [i for i in order[:max(1, room // T)] if len(stories[i]) - 1 <= T or T > WIDTHS[-1]]
            order = order[len(group):]
            x = torch.full((len(group), max(self.at[i + 1] - self.at[i] for i in group)), PAD)
            for row, i in enumerate(group):
                s = stories[i][:self.at[i + 1] - self.at[i]]
                x[row, :len(s)] = torch.from_numpy(s.astype(np.int64))
            with torch.autocast("cpu", torch.bfloat16): p = sum(torch.softmax(m(x).float(), -1) for m in models) / len(models)
            p, ids = p.topk(self.k)
            for row, i in enumerate(group):
                a, b = self.at[i:i + 2]
                self.ids[a:b], self.p[a:b] = ids[row, :b - a].numpy(), p[row, :b - a].numpy()
            print(f"teachers: {len(order)} stories to go", flush=True)

    def __getitem__(self, i):
        a, b = self.at[i:i + 2]
        return self.ids[a:b], self.p[a:b]


def batches(stories, room, seed, epoch, rename=None, drop_start=.5, lesson=None):
    "Each story once, in batches of nine fixed shapes: x, y (room // T, T), -100 where there is nothing to predict; with `lesson`, the teachers' ids and chances (room // T, T, k)."
    rng = np.random.default_rng((seed, epoch))
    width = np.searchsorted(WIDTHS, [min(len(s) - 1, WIDTHS[-1]) for s in stories])
    groups = []
    for w, T in enumerate(WIDTHS):
        mine = rng.permutation(np.flatnonzero(width == w))
        groups += [(T, mine[i:i + room // T]) for i in range(0, len(mine), room // T)]
    for j in rng.permutation(len(groups)):
        T, group = groups[j]
        x = torch.full((room // T, T), PAD); y = torch.full_like(x, -100)
        if lesson: ids, p = np.zeros((*x.shape, lesson.k), np.uint16), np.zeros((*x.shape, lesson.k), np.float16)
        for row, i in enumerate(group):
            s = stories[i][:T + 1]
            swap = rename(s, rng) if rename and rng.random() < .5 else {}
            cut = int(rng.random() < drop_start)
            s = torch.from_numpy(swapped(s, swap)[cut:].astype(np.int64))
            x[row, :len(s) - 1], y[row, :len(s) - 1] = s[:-1], s[1:]
            if lesson:
                a, b = lesson[i]
                ids[row, :len(s) - 1], p[row, :len(s) - 1] = swapped(a[cut:], swap), b[cut:]
        yield (x, y, torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(p.astype(np.float32))) if lesson else (x, y)


def _norm(x, w, eps): return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w

def _block(x, n1, qkv, o, n2, gate, up, down, cos, sin, bias, keep1, keep2, level, heads: int, eps: float):
    "One block; `keep`: (B, T, C) bytes, kept where at least `level`."
    B, T, C = x.shape
    bf, scale = torch.bfloat16, 256 / (256 - level)
    h = _norm(x, n1, eps).to(bf) @ qkv.to(bf).T
    q, k, v = h.view(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4).reshape(3, B * heads, T, C // heads)
    q, k = apply_rope(q.float(), cos, sin).to(bf), apply_rope(k.float(), cos, sin).to(bf)
    a = torch.softmax(torch.bmm(q, k.transpose(1, 2)).float() * (C // heads) ** -.5 + bias, -1).to(bf)
    y = torch.bmm(a, v).view(B, heads, T, C // heads).transpose(1, 2).reshape(B, T, C) @ o.to(bf).T
    x = x + y.float() * (keep1 >= level) * scale
    h = _norm(x, n2, eps).to(bf)
    y = (F.silu((h @ gate.to(bf).T).float()) * (h @ up.to(bf).T).float()).to(bf) @ down.to(bf).T
    return x + y.float() * (keep2 >= level) * scale

def _logits(h, norm, emb, eps: float): return (_norm(h, norm, eps).to(torch.bfloat16) @ emb.to(torch.bfloat16).T).float()

def _head(h, norm, emb, y, eps: float):
    "Summed loss of a chunk of rows."
    return F.cross_entropy(_logits(h, norm, emb, eps), y, ignore_index=-100, reduction="sum")

def _taught(h, norm, emb, y, ids, p, eps: float):
    "Summed loss of a chunk of rows, half of it against the teachers' chances; what they leave out counts for the token that came."
    logp = torch.log_softmax(_logits(h, norm, emb, eps), -1)
    hard = -logp.gather(1, y.clamp_min(0)[:, None])[:, 0]
    soft = -(logp.gather(1, ids) * p).sum(1) + (1 - p.sum(1)) * hard
    return ((hard + soft) / 2 * (y >= 0)).sum()

class FastLoss:
    "Mean loss of `model` on (x, y), with dropout and token noise; shares the model's parameters."
    def __init__(self, model):
        torch._dynamo.config.cache_size_limit = 64
        self.m, self.block, self.head = model, torch.compile(_block, dynamic=False), torch.compile(_head, dynamic=False)
        self.taught = torch.compile(_taught, dynamic=False)
        self.bias = {T: torch.full((T, T), -1e9).triu(1) for T in WIDTHS}

    def __call__(self, x, y, ids=None, p=None, *, rng, dropout=0.0, noise=0.0):
        m, cfg, (B, T) = self.m, self.m.config, x.shape
        if noise: x = torch.where(torch.from_numpy(rng.random((B, T), dtype=np.float32) < noise) & (x != 0), PAD, x)
        level = torch.tensor(round(256 * dropout), dtype=torch.int32)
        keep = lambda: torch.from_numpy(np.frombuffer(rng.bytes(B * T * cfg.d_model), np.uint8).reshape(B, T, -1).copy())
        h = F.embedding(x, m.tok_emb.weight)
        for b in m.blocks:
            h = self.block(h, b.norm1.weight, b.attn.qkv.weight, b.attn.W_o.weight, b.norm2.weight, b.mlp.gate.weight, b.mlp.up.weight,
                           b.mlp.down.weight, m.cos[:T], m.sin[:T], self.bias[T], keep(), keep(), level, cfg.n_heads, cfg.norm_eps)
        flat = [h.flatten(0, 1), y.flatten()] + ([] if ids is None else [ids.flatten(0, 1), p.flatten(0, 1)])
        if -len(flat[0]) % ROWS: flat = [F.pad(t, (0, 0) * (t.dim() - 1) + (0, -len(t) % ROWS), value=-100 if t.dim() == 1 else 0) for t in flat]
        head = self.head if ids is None else self.taught
        total = sum(head(h, m.norm_f.weight, m.tok_emb.weight, *rest, cfg.norm_eps) for h, *rest in zip(*(t.split(ROWS) for t in flat)))
        return total / (y != -100).sum()


def check(model, x, y):
    "Print loss and largest gradient difference against the plain model's."
    def grads(loss): model.zero_grad(); loss.backward(); return loss.item(), [p.grad.clone() for p in model.parameters()]
    model.eval()
    a, ga = grads(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100))
    b, gb = grads(FastLoss(model)(x, y, rng=np.random.default_rng(0)))
    worst = max(((p - q).norm() / p.norm()).item() for p, q in zip(ga, gb))
    print(f"plain {a:.5f}, fast {b:.5f}, gradients differ by at most {worst:.1%} of their norm")
    model.zero_grad()
    return abs(a - b), worst


def average(paths, shares, scale, out, valid):
    "The weights' weighted mean, its last norm times `scale`, which makes an overfitted model less sure; prints the held-out loss."
    models = [load_checkpoint(p) for p in paths]
    states = [m.state_dict() for m in models]
    model = models[0]
    model.load_state_dict({k: sum(w / sum(shares) * s[k] for w, s in zip(shares, states)) for k in states[0]})
    model.norm_f.weight.data *= scale
    save_checkpoint(model, out / "model.safetensors")
    print(f"held-out loss {story_loss(model, valid):.4f}")


def run(a):
    out = Path(a.out); out.mkdir(parents=True, exist_ok=True)
    data = out / "data"
    if not (data / "train.bin").exists():
        data.mkdir(exist_ok=True)
        (data / "text.txt").write_text(plain(Path(a.text).read_text(encoding="utf-8")), encoding="utf-8")
        prepare(data / "text.txt", n_valid=200, seed=0, data_dir=data)
    tok, train, valid = BPETokenizer.load(data / "tokenizer.json"), load_ids("train", data), load_ids("valid", data)
    if a.average: return average(a.average, a.shares or [1] * len(a.average), a.scale, out, valid)
    model = load_checkpoint(a.init) if a.init else GPT(load_checkpoint(ASSETS / "base.safetensors").config)
    if a.check: return check(model, *next(batches(train, a.room, a.seed, 0)))
    s = PretrainConfig(steps=a.steps, optimizer="muon", lr=a.lr, weight_decay=a.decay, tokens_per_step=a.room, warmup=60, hold=a.hold, seed=a.seed, eval_every=a.every)
    opts, loss_of, rename = make_optimizers(model, s), FastLoss(model), Renamer(tok, train)
    lesson = Lesson(data / "lesson", train) if a.teachers else None
    if lesson: lesson.write([load_checkpoint(c).eval() for c in a.teachers], train)
    step = tokens = epoch = index = 0; mean = None; seconds = 0.0; log = []
    if (out / "state.pt").exists():
        st = read_state(out / "state.pt")
        model.load_state_dict(st["model"])
        for o, d in zip(opts, st["opts"]): o.load_state_dict(d)
        step, tokens, epoch, index, mean, seconds, log = st["at"]
    while step < a.steps:
        for i, (x, y, *taught) in enumerate(batches(train, a.room, a.seed, epoch, rename, lesson=lesson)):
            if i < index: continue
            start = time.perf_counter()
            fall = max(0.0, min(1.0, (a.steps - step) / (a.steps * (1 - a.hold))))   # 1 while the rate holds, then to 0
            lr = a.lr * min(1.0, (step + 1) / 60) * fall
            rng = np.random.default_rng((a.seed, step, 7))
            loss = loss_of(x, y, *taught, rng=rng, dropout=a.dropout * (a.floor + (1 - a.floor) * fall), noise=a.noise * fall)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not torch.isfinite(loss + norm): raise FloatingPointError(f"step {step}: loss {loss.item()}, gradient {norm.item()}")
            for o in opts:
                for g in o.param_groups: g["lr"] = lr
                o.step(); o.zero_grad()
            n = (y != -100).sum().item()
            step, tokens, index, seconds = step + 1, tokens + n, i + 1, seconds + time.perf_counter() - start
            mean = loss.item() if mean is None else .98 * mean + .02 * loss.item()
            if step % 10 == 0: print(step, tuple(x.shape), f"{mean:.3f} {n / (time.perf_counter() - start):.0f} tok/s", flush=True)
            if step % a.every == 0 or step == a.steps:
                v = story_loss(model, valid)
                log.append(dict(step=step, tokens=tokens, epoch=epoch, lr=lr, train_loss=mean, valid_loss=v, seconds=round(seconds, 1)))
                print(log[-1], flush=True)
                save_checkpoint(model, out / "model.safetensors")
                write_jsonl(out / "log.jsonl", [{k: v for k, v in vars(a).items() if k not in ("out", "text", "init", "check", "teachers", "average", "shares", "scale")}] + log)
                write_state(out / "state.pt", dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], at=[step, tokens, epoch, index, mean, seconds, log]))
            if step == a.steps: return
        epoch, index = epoch + 1, 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="folder of the run: data, model, state, log")
    p.add_argument("--text", default="../shared/tinystories/train.txt", help="stories, separated by <|endoftext|>")
    p.add_argument("--init", help="checkpoint to go on from; default: new weights")
    p.add_argument("--teachers", nargs="+", help="checkpoints whose chances are half of the lesson")
    p.add_argument("--average", nargs="+", help="instead of training: average these checkpoints")
    p.add_argument("--shares", nargs="+", type=float, help="of each in the average; default: equal"); p.add_argument("--scale", type=float, default=1.0, help="factor on the last norm of the average")
    p.add_argument("--steps", type=int, default=1700)
    p.add_argument("--room", type=int, default=8192, help="tokens a step, padding included")
    p.add_argument("--lr", type=float, default=1.6e-3); p.add_argument("--hold", type=float, default=.1, help="part of the steps before the rate falls")
    p.add_argument("--decay", type=float, default=.3, help="weight decay"); p.add_argument("--dropout", type=float, default=.16)
    p.add_argument("--floor", type=float, default=.3, help="part of the dropout that is left at the end"); p.add_argument("--noise", type=float, default=.08)
    p.add_argument("--every", type=int, default=150, help="steps between validations"); p.add_argument("--seed", type=int, default=1)
    p.add_argument("--check", action="store_true", help="compare with the plain model and stop")
    run(p.parse_args())

if __name__ == "__main__": main()
