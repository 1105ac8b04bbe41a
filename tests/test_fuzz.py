"""Nothing run: thousands of damaged and hostile files. Each loads to exactly what it says, or is refused with `BadFileError`.

All cases run in one child, `python test_fuzz.py FOLDER`, which may take 1 GB of memory more than at its start, and 5 seconds for a
case. It keeps the name of the case that runs in a file, so that a crash is named too. What a folder says is read a second time here,
with nothing but `json`, `re` and `torch.frombuffer`. `python test_fuzz.py FOLDER KIND NUMBER` runs a single case.
"""
import ast, copy, faulthandler, io, json, math, os, pickle, random, re, resource, shutil, signal, struct, subprocess, sys, tempfile, warnings, zipfile
from collections import Counter
from pathlib import Path
import pytest, torch
import tiny_llm
from tiny_llm.adapter import load_adapter, read_adapter, save_adapter, swap_adapter
from tiny_llm.files import BadFileError
from tiny_llm.finetune import FinetuneResult, load_finetune_state, save_finetune_state
from tiny_llm.gpt import GPT, GPTConfig, load_checkpoint, save_checkpoint
from tiny_llm.instruct import read_examples
from tiny_llm.lora import add_lora_to_model, lora_modules, lora_parameters
from tiny_llm.bpe import BPETokenizer
from tiny_llm.train import read_state

CONFIG, WEIGHTS, NOTE = FILES = "adapter_config.json", "adapter_model.safetensors", "tiny_llm.json"
PREFIX, SECONDS, ROOM = "base_model.model.", 5, 1 << 30
CASES = {"adapter, ours": 2600, "adapter, PEFT's": 2600, "checkpoint": 500, "checkpoint, .pt": 500, "examples": 500, "tokenizer": 500, "state of a run": 500}

def small(): torch.manual_seed(0); return GPT(GPTConfig(vocab_size=31, max_seq_len=16, d_model=16, n_heads=2, n_layers=2, d_mlp=16)).eval()

# Damage to bytes

def flip(rng, b):
    b = bytearray(b)
    for _ in range(rng.choice([1, 1, 2, 8])): b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    return bytes(b)

def splice(rng, b):
    i, j, k = (rng.randrange(len(b)) for _ in range(3))
    return b[:i] + b[min(j, k):max(j, k)] + b[i + rng.randrange(40):]

BYTES = [flip, flip, splice, lambda rng, b: b[:rng.randrange(len(b))], lambda rng, b: b + rng.randbytes(rng.choice([1, 8, 4096])),
         lambda rng, b: rng.randbytes(rng.randrange(300)), lambda rng, b: rng.choice([b"", b"\0" * 64, b"PK\3\4", b"\xff\xfe", b"\xef\xbb\xbf" + b, b * 2])]
EVIL_BYTES = [b"\x80\x04", b"(", b".", b"0.", b"t.", b"R.", b"\x85R.", b"cos\nsystem\n(S'touch x'\ntR.", b"c__builtin__\neval\n(S'1'\ntR.", b"I1\nQ.", b"h\x00.", b"}(u.", b"s.", b"b."]

class Evil:
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return open, (self.marker, "w")

# Damage to JSON

TRICKS = ["..", "/etc/passwd", "../../x", "", ".", "qkv\0", "blocks.0.\u0430ttn.qkv", "blocks.0.attn.qkv ", "BLOCKS.0.ATTN.QKV", "blocks.0..attn.qkv", "\ud800",
          "x" * 100_000, "__class__", "base", "lm_head", "tok_emb", "blocks", "blocks.9.attn.qkv", "W_o", "qkv", "attn.qkv", "all-linear"]
REGEX = [r"(a|aa|b|l|o|c|k|s|\.|0|t|n|q|v|.|\w|\S)+\d", r"(.*)*\d", r"(.*a){25}", "(", "[", "*", "(?R)", "(?:(?R)|.)*", "(?P<q>(?:(?&q)(?&q))*)", r"(?<=.*.*x).*", "(" * 400 + ")" * 400,
         "(?:(?:(?:a{1000}){1000}){1000}){1000}", "(?:x{2147483647}){2147483647}", r"(?:(?:.?){65535}){65535}", "x{99999999999999999999}", "(?:blocks.0.attn.qkz){e}", "(?b)(?:zzzzzzzzzzzzzzzzz){e}", "[[:alpha:]]*",
         r"\p{L}", ".*", "^.*$", ".*qkv", ".*(qkv|W_o)", "x|" * 600 + ".*qkv", r"(?i).*QKV", r".*\.[qW].*", ".*attn.*", "\\", "(?(1)a|b)", "a" * 2000, r"\N{LATIN SMALL LETTER A}", "((((.{0,99999}){0,99999}){0,99999}){0,99999})z"]
SLOW = {"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\\d\\d" + "x?" * i: 4 for i in range(150)} # each of them just within a limit for one

def deep(n): return json.loads("[" * n + "]" * n)

def value(rng, old=None):
    "Something that does not belong there, or might."
    pool = [None, True, False, 0, 1, -1, 2, 3, 4, 1.5, 8.0, 1e308, -0.0, math.nan, math.inf, -math.inf, 10**30, 10**400, 2**31, 2**63, 2**64, "", "x", "8", [], {}, [[]], [None], {"a": None}, [{}],
            ["qkv"], ["W_o"], ["qkv", "W_o", "nothing"], ["lm_head"], {"qkv": 3}, {"qkv": 64.0}, {"qkv": "3"}, {"": 3}, {"attn.qkv": 5, "qkv": 7}, {"^blocks.1.attn.qkv$": 11.5}, {r".*\.W_o": 2}, {"blocks.0.attn.W_o": 1e-300},
            deep(50), deep(700), ["x"] * 2000, {str(i): 1 for i in range(1500)}, rng.choice(TRICKS), [rng.choice(TRICKS)], {rng.choice(TRICKS): 3},
            rng.choice(REGEX), [rng.choice(REGEX)], {rng.choice(REGEX): rng.choice([3, 4, 5.5])}, {rng.choice(REGEX): 3}, old, [old], {"a": old}, [old, old]]
    return rng.choice(pool)

def damage_object(rng, d):
    "A JSON object with fields changed, gone, doubled, added; as text."
    keys, d = sorted(d), copy.deepcopy(d)
    for _ in range(rng.choice([1, 1, 2])):
        k = rng.choice(keys)
        what = rng.randrange(8)
        if what < 6: d[k] = value(rng, d.get(k))
        elif what == 6: d.pop(k, None)
        else: d[rng.choice(["use_magic", k.upper(), k + " ", "", "\0", "__proto__"])] = value(rng)
    text = json.dumps(d)
    if rng.random() < 0.1: k = rng.choice(keys); text = text[:-1] + f", {json.dumps(k)}: {json.dumps(d.get(k))}" + "}"
    return text

def damage_json(rng, b, keys=()):
    "As `damage_object`, or to the text itself."
    if rng.random() < 0.7: return damage_object(rng, {**json.loads(b), **{k: None for k in keys if rng.random() < 0.02}}).encode()
    return rng.choice([b"[" * rng.choice([900, 100_000]), b'{"a":' * 50_000, b"null", b"3", b'"x"', b"[]", b"{}", b"NaN", b"9" * 5000, b'{"r": ' + b"1" * 4000 + b"}", b"\xff", b.decode().encode("utf-16"), b"// x\n" + b,
                       b[:-2] + b",}", b.replace(b":", b"=", 1), b.replace(b'"r": ', b'"r": 8, "r": '), b.replace(b" ", b"\t"), b"\xef\xbb\xbf" + b, b.replace(b'"r"', b'"\\u0072"'), b"\n\n" + b])

# Damage to a safetensors file

def split(b): n, = struct.unpack("<Q", b[:8]); return json.loads(b[8:8 + n]), b[8 + n:]
def join(header, data, n=None): h = header if isinstance(header, bytes) else json.dumps(header).encode(); return struct.pack("<Q", len(h) if n is None else n) + h + data

TYPES = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F4 C64 I64 I32 I16 I8 U64 U32 U16 U8 BOOL f32 F128 x".split()
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64}

def damage_header(rng, b):
    header, data = split(b)
    keys = [k for k in header if k != "__metadata__"]
    k, other, n = rng.choice(keys), rng.choice(keys), None
    entry, what = header[k], rng.randrange(15)
    if what == 0: entry["dtype"] = rng.choice(TYPES + [3, None])
    elif what == 1: entry["shape"] = rng.choice([entry["shape"][::-1], [], [0], [-1, 4], [2**31, 2**31], [2**62, 4], [2**64, 1], [1.5], "x", entry["shape"] + [1], [1] + entry["shape"], [math.prod(entry["shape"])], None, [1] * 5000])
    elif what == 2: entry["data_offsets"] = rng.choice([header[other]["data_offsets"], [0, 0], entry["data_offsets"][::-1], [0, len(data)], [0, 2**63], [-4, 4], [2**64 - 1, 3], [0], "x", [o + 4 for o in entry["data_offsets"]]])
    elif what == 3: header[k], header[other] = header[other], header[k]
    elif what == 4: header[k] = {**entry, "dtype": "F32", "shape": [1 << rng.choice([20, 31, 40]), 16], "data_offsets": [0, 64 << rng.choice([20, 31, 40])]}
    elif what == 5: header[rng.choice([PREFIX + t + ".lora_A.weight" for t in TRICKS[:-5]] + TRICKS + [PREFIX + ".lora_A.weight", PREFIX + "lora_A.weight", k + "\n", k.upper(), k.replace("weight", "bias")])] = header.pop(k)
    elif what == 6: header["__metadata__"] = rng.choice([None, {}, {"format": "tf"}, {"format": 3}, [], "x", {"x": "y" * 10**6}, {"gpt_config": "[" * 100_000}])
    elif what == 7: n = rng.choice([0, 1, 2**63, 2**64 - 1, 100_000_001, len(b), len(b) - 8, len(json.dumps(header)) - 1, len(json.dumps(header)) + 1])
    elif what == 8: return join(rng.choice([b"[" * 100_000, b"{}", b"[]", b"null", b"", b'{"a":' * 100_000, b"\xff" * 50, b" " * 500_000 + json.dumps(header).encode()]), data)
    elif what == 9: return join(json.dumps(header).encode()[:-1] + b", " + json.dumps({k: header[other]}).encode()[1:], data)
    elif what == 10: header.pop(k)
    elif what == 11: data = rng.choice([data[:-4], data + b"\0" * 4, data[4:], b"", flip(rng, data)])
    elif what == 12: return retyped(rng, b)
    elif what == 13: i = entry["data_offsets"][0]; data = data[:i] + struct.pack("<f", rng.choice([math.nan, math.inf, -math.inf, 3e38, 1e-45])) + data[i + 4:]
    else: header = {a: header[a] for a in rng.sample(sorted(header), len(header))}; return join(json.dumps(header).encode() + b" " * rng.randrange(16), data)
    return join(header, data, n)

def tensors_of(b):
    "A second reader of safetensors: name -> tensor."
    header, data = split(b)
    out = {}
    for k, e in header.items():
        if k == "__metadata__": continue
        (i, j), dtype = e["data_offsets"], DTYPES[e["dtype"]]
        out[k] = torch.frombuffer(bytearray(data[i:j]), dtype=dtype).reshape(e["shape"]) if j > i else torch.empty(e["shape"], dtype=dtype)
    return out

def retyped(rng, b):
    "The same tensors in other types, some of them too large for float32."
    header, at, data = {}, 0, b""
    for k, t in tensors_of(b).items():
        kind = rng.choice(["F64", "F32", "F16", "BF16", "F8_E4M3", "I32", "BOOL"] if rng.random() < 0.2 else ["F64", "F16", "BF16", "F32"])
        t = t.to(DTYPES[kind])
        if kind == "F64" and rng.random() < 0.1: t = t * 1e300
        raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[k] = dict(dtype=kind, shape=list(t.shape), data_offsets=[at, at + len(raw)]); at += len(raw); data += raw
    return join(header, data)

# Damage to a folder

def write(folder, files):
    for name, b in files.items(): (folder/name).parent.mkdir(exist_ok=True); (folder/name).write_bytes(b)

def damage_file(rng, name, b, marker):
    how = rng.randrange(10)
    if how < 3: return rng.choice(BYTES)(rng, b)
    if how == 3: return rng.choice([pickle.dumps(Evil(marker)), pickle.dumps(Evil(marker), 0), rng.choice(EVIL_BYTES)])
    if name == WEIGHTS: return damage_header(rng, b)
    return damage_json(rng, b, FIELD_NAMES if name == CONFIG else ())

def replace_by(rng, path, other=None):
    "A thing that is no plain file, or a huge one, in place of a file of an adapter; a lone file is one that its user named, perhaps a pipe."
    kind = rng.choice("folder fifo zero null itself dangling other sparse grown socket".split() if other else ["folder", "null", "dangling"])
    if kind in ("sparse", "grown"): # header claims gigabytes, and the (empty) disk blocks are there
        size = rng.choice([2, 8, 64]) << 30
        if kind == "sparse" and path.name == WEIGHTS: path.write_bytes(join({PREFIX + "blocks.0.attn.qkv.lora_A.weight": dict(dtype="F32", shape=[size // 64, 16], data_offsets=[0, size])}, b"")); size += path.stat().st_size
        return os.truncate(path, size)
    if path.exists(): path.unlink()
    if kind == "folder": path.mkdir()
    elif kind == "fifo": os.mkfifo(path)
    elif kind == "socket": os.mknod(path, 0o140600)
    else: path.symlink_to({"zero": "/dev/zero", "null": "/dev/null", "itself": path.name, "dangling": "nowhere", "other": other and other/path.name}[kind])

def staged(rng, folder, files, others, marker):
    "A `.new`, as a kill while moving leaves it, or as nobody leaves it."
    kind = rng.randrange(6)
    if kind == 0: (folder/".new").write_bytes(b"x")
    elif kind == 1: (folder/".new").symlink_to(rng.choice([".new", ".", "nowhere", "/dev"]))
    else:
        source = rng.choice([files, others])
        chosen = {n: source[n] for n in rng.sample(sorted(source), rng.randrange(len(source) + 1))}
        if kind == 2 and chosen: n = rng.choice(sorted(chosen)); chosen[n] = damage_file(rng, n, chosen[n], marker)
        (folder/".new").mkdir(); write(folder/".new", chosen)
        if kind == 3 and source is others and rng.random() < 0.5: write(folder/".new", others)

# What a folder says, read a second time

def of_blocks(name, config):
    "PEFT's `layers_to_transform`."
    wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if wanted in (None, []) or isinstance(config["target_modules"], str) or name in config["target_modules"]: return True
    found = [re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in ([patterns] if isinstance(patterns, str) else patterns)] if patterns else [re.match(r".*?\.[^.]*\.(\d+)\.", name)]
    return any(m and int(m[1]) in ([wanted] if isinstance(wanted, int) else wanted) for m in found)

def chosen(rule, name):
    if isinstance(rule, str): return re.fullmatch(rule, name) is not None
    return any(name == t or name.endswith("." + t) for t in rule)

def said(folder, model):
    "name -> (A, B, scaling), or an error where it says nothing clear."
    at = lambda name: folder/".new"/name if (folder/".new"/name).exists() else folder/name
    config, tensors = json.loads(at(CONFIG).read_text(encoding="utf-8")), tensors_of(at(WEIGHTS).read_bytes())
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    targets = config["target_modules"]
    names = [n for n in linear if (n != "lm_head" if targets == "all-linear" else chosen(targets, n))]
    names = [n for n in names if of_blocks(n, config) and not chosen(config.get("exclude_modules") or [], n)]
    out = {}
    for n in names:
        A, B = (tensors.pop(f"{PREFIX}{n}.lora_{ab}.weight").to(torch.float32) for ab in "AB")
        of = lambda field, usual: next((v for k, v in (config.get(field) or {}).items() if re.match(rf"(.*\.)?({k})$", n)), usual)
        r, alpha = of("rank_pattern", config["r"]), of("alpha_pattern", config["lora_alpha"])
        assert A.shape[0] == B.shape[1] == r and A.isfinite().all() and B.isfinite().all()
        out[n] = A, B, alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    assert not tensors, "tensors that belong to no layer"
    return out

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in ((a[n], b[n]) for n in a))

def carried(model): return {n: (m.A.detach(), m.B.detach(), m.scaling) for n, m in lora_modules(model).items()}

# A case of each kind: damage(rng, i) makes files, and returns a check that loads them: True if loaded, or an error

class Adapters:
    def __init__(self, home, ours):
        self.home, self.ours, self.marker, self.base = home, ours, home/"marker", small()
        self.models = [add_lora_to_model(small(), r=4, alpha=8), add_lora_to_model(small(), r=2, alpha=6, rank_pattern={"qkv": 3}, alpha_pattern={"W_o": 5})]
        self.known, self.files = [], []
        for i, m in enumerate(self.models):
            for p in lora_parameters(m): torch.nn.init.normal_(p)
            save_adapter(m, home/f"good{i}")
            if not ours: (home/f"good{i}"/NOTE).unlink()
            self.files.append({p.name: p.read_bytes() for p in sorted((home/f"good{i}").iterdir())})
            self.known.append(copy.deepcopy(carried(m)))
        self.plain, self.wearing = small(), copy.deepcopy(self.models[0])
        self.still = {id(m): self.picture(m) for m in (self.plain, self.wearing)}
    def picture(self, m): return ({k: v.clone() for k, v in m.state_dict().items()}, [(n, type(x), x.training, id(x)) for n, x in m.named_modules()], [(n, p.requires_grad, id(p)) for n, p in m.named_parameters()])
    def unchanged(self, m):
        a, b = self.picture(m), self.still[id(m)]
        return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())
    def damage(self, rng, folder):
        one, how = int(rng.random() < 0.3), rng.random()
        files, others, other_folder = dict(self.files[one]), self.files[1 - one], self.home/f"good{1 - one}"
        name = rng.choice([CONFIG, WEIGHTS, *files])
        if how < 0.72:
            for name in rng.sample(sorted(files), rng.choice([1, 1, 1, 2])): files[name] = damage_file(rng, name, files[name], self.marker)
        elif how < 0.76: del files[name]
        elif how < 0.80: files[name] = others[name]
        elif how < 0.83: files["adapter_model.bin"] = pickle.dumps(Evil(self.marker)); files.pop(rng.choice([WEIGHTS, "adapter_model.bin"]))
        elif how < 0.832: files[CONFIG] = json.dumps({**json.loads(files[CONFIG]), "alpha_pattern": SLOW}).encode()
        folder.mkdir(); write(folder, files)
        if how >= 0.92: staged(rng, folder, files, others, self.marker)
        elif how >= 0.832: replace_by(rng, folder/name, other_folder)
    def check(self, rng, folder):
        if rng.random() < 0.1 and not huge(folder): read_adapter(folder)
        model, load = rng.choice([(self.plain, load_adapter), (self.wearing, swap_adapter), (self.wearing, load_adapter)])
        try: loaded = carried(load(model, folder))
        except BadFileError:
            assert self.unchanged(model), f"{load.__name__} changed the model before it gave up"
            raise
        self.renew(model); truth = None
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try: truth = said(folder, self.base)
        except TookTooLong: pass # an evil pattern that stops `re`, which has no limit of time
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        note = folder/".new"/NOTE if (folder/".new"/NOTE).exists() else folder/NOTE
        assert truth is None or equal(loaded, truth), "not what the files say"
        assert not note.exists() or any(equal(loaded, k) for k in self.known), "not what was saved, in spite of the note"
    def renew(self, old):
        "A model in place of one that was changed, as it should be."
        del self.still[id(old)]
        new = small() if old is self.plain else copy.deepcopy(self.models[0])
        if old is self.plain: self.plain = new
        else: self.wearing = new
        self.still[id(new)] = self.picture(new)

def huge(folder): return any(p.is_file() and p.stat().st_size > 1 << 30 for p in folder.rglob("*"))
FIELD_NAMES = "rank_pattern alpha_pattern exclude_modules layers_to_transform layers_pattern use_rslora use_dora bias modules_to_save".split()

class Checkpoints:
    def __init__(self, home, suffix):
        self.marker, self.suffix, self.model = home/"marker", suffix, small()
        save_checkpoint(self.model, home/"good.safetensors")
        torch.save({"model": self.model.state_dict(), "gpt_config": self.model.config}, home/"good.pt")
        self.bytes, self.truth = (home/f"good{suffix}").read_bytes(), {k: v.clone() for k, v in self.model.state_dict().items()}
        self.config = dict(vars(self.model.config))
    def damage(self, rng, folder):
        folder.mkdir()
        path, how = folder/f"m{self.suffix}", rng.random()
        path.write_bytes(self.bytes)
        if how < 0.05: return replace_by(rng, path)
        if how < 0.3: b = damage_file(rng, WEIGHTS, self.bytes, self.marker) if self.suffix == ".safetensors" else damage_zip(rng, self.bytes, self.marker)
        elif how < 0.4: b = rng.choice(BYTES)(rng, self.bytes)
        elif self.suffix == ".pt": b = saved(damage_tree(rng, {"model": self.truth, "gpt_config": self.config}))
        elif how < 0.6: b = damage_header(rng, self.bytes)
        else:
            header, data = split(self.bytes)
            header["__metadata__"]["gpt_config"] = damage_json(rng, json.dumps(self.config).encode()).decode("utf-8", "surrogateescape")
            try: b = join(header, data)
            except UnicodeError: b = b""
        path.write_bytes(b)
    def check(self, rng, folder):
        path = folder/f"m{self.suffix}"
        model = load_checkpoint(path)
        got = model.state_dict()
        if self.suffix == ".pt":
            with torch.serialization.safe_globals([GPTConfig]): said = torch.load(path, weights_only=True)["model"]
        else: said = tensors_of(path.read_bytes())
        if model.config.tie_weights: said.setdefault("lm_head.weight", said["tok_emb.weight"])
        assert got.keys() == said.keys() and all(same(v, said[k].to(torch.float32)) for k, v in got.items()), "not what the file says"
        assert model(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, 31)

def saved(d):
    f = io.BytesIO()
    try: torch.save(d, f)
    except RecursionError: return b"" # too deep to be written
    return f.getvalue()

def damage_zip(rng, b, marker):
    "Other bytes in one member of the archive, with the checksum that they need."
    z = zipfile.ZipFile(io.BytesIO(b)); out = io.BytesIO()
    name = rng.choice([n for n in z.namelist() if n.endswith("data.pkl")] * 6 + z.namelist())
    with zipfile.ZipFile(out, "w") as w:
        for n in z.namelist():
            data = z.read(n)
            if n == name: data = rng.choice([lambda: rng.choice(BYTES)(rng, data), lambda: flip(rng, data), lambda: rng.choice(EVIL_BYTES), lambda: pickle.dumps(Evil(marker), 2)])() if data else b"x"
            if n != name or rng.random() < 0.95: w.writestr(n, data)
    return rng.choice([out.getvalue(), out.getvalue(), pickle.dumps(Evil(marker), 2)])

def damage_tree(rng, d):
    "One thing in nested dicts, lists and tensors replaced."
    if isinstance(d, torch.Tensor) and rng.random() < 0.8:
        return rng.choice([lambda: d.reshape(-1), lambda: d.reshape(-1)[:1], lambda: d.sum(), lambda: d.double(), lambda: d.bfloat16(), lambda: d.long(), lambda: d * math.nan, lambda: d.to(torch.complex64), lambda: d.to_sparse(), lambda: torch.empty(0),
                           lambda: d.float().double() * 1e300, lambda: d.to("meta"), lambda: torch.zeros(()).expand(1 << 34)])()
    if isinstance(d, (dict, list)) and d and rng.random() < 0.9:
        d = copy.copy(d); k = rng.choice(list(d) if isinstance(d, dict) else range(len(d)))
        if rng.random() < 0.1: d.pop(k)
        else: d[k] = damage_tree(rng, d[k])
        return d
    return rng.choice([value(rng, d), torch.tensor(3.0), torch.zeros(2, 2), [torch.zeros(1)], 1 + 2j, b"x", (d, d), {3: 4}, {(1, 2): d}])

class Examples:
    rows = [{"instruction": "Say hi.", "input": "", "output": "Hi."}, {"instruction": "A", "context": "B", "response": "C"}, {"story": "A fox."}, {"text": "[INST] a[/INST] b"},
            {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}]
    def __init__(self, home, jsonl=None): self.marker = home/"marker"
    def damage(self, rng, folder):
        folder.mkdir()
        rows = copy.deepcopy(self.rows); rng.shuffle(rows); path = folder/"data.jsonl"
        lines = [damage_object(rng, r) if rng.random() < 0.3 else json.dumps(r) for r in rows]
        b = (rng.choice(["\n", "\r\n", "\n\n"]).join(lines) if rng.random() < 0.5 else "[" + ", ".join(lines) + "]").encode()
        path.write_bytes(b)
        if rng.random() < 0.1: replace_by(rng, path)
        elif rng.random() < 0.5: path.write_bytes(rng.choice(BYTES)(rng, b) if rng.random() < 0.8 else damage_json(rng, json.dumps(self.rows[0]).encode()))
    def check(self, rng, folder):
        for e in read_examples(folder/"data.jsonl"):
            e.encode(); assert re.fullmatch(r"(?s)\[INST\] \S.*\[/INST\] \S.*", e), e

class Tokenizers:
    texts = ["The fox sat.", "a\0\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "<|endoftext|> x", "ab " * 50]
    def __init__(self, home, _=None):
        self.marker = home/"marker"
        BPETokenizer.train(["the fox sat on the mat with the hat"] * 3, 270).save(home/"good.json"); self.bytes = (home/"good.json").read_bytes()
    def damage(self, rng, folder):
        folder.mkdir(); path, how = folder/"t.json", rng.random()
        d = json.loads(self.bytes)
        if how < 0.4: b = rng.choice(BYTES)(rng, self.bytes)
        elif how < 0.5: b = damage_json(rng, self.bytes)
        else: b = json.dumps(damage_tree(rng, d), default=str, skipkeys=True).encode()
        path.write_bytes(b)
        if rng.random() < 0.05: replace_by(rng, path)
    def check(self, rng, folder):
        tok = BPETokenizer.load(folder/"t.json")
        for t in self.texts: assert all(0 <= i < len(tok) for i in tok.encode(t) + [tok.eot, tok.pad]), "an id beyond the vocabulary"; tok.decode(tok.encode(t))

class States:
    run = dict(lr=1e-3, layers="some")
    def __init__(self, home, _=None):
        self.marker, (self.result, self.opt) = home/"marker", self.fresh()
        self.result.losses, self.result.valid_losses, self.result.tokens = [1.5, 2.5], [(0, 3.0)], 7
        for p in lora_parameters(self.result.model): p.grad = torch.randn_like(p)
        self.opt.step(); save_finetune_state(home/"good.pt", self.result, self.opt, self.run)
        self.bytes, self.dict = (home/"good.pt").read_bytes(), read_state(home/"good.pt")
        self.now = self.fresh()
    def fresh(self):
        m = add_lora_to_model(small(), r=2); return FinetuneResult(m), torch.optim.AdamW(lora_parameters(m), lr=0.1)
    def picture(self, result, opt): return copy.deepcopy(([p.detach().clone() for p in lora_parameters(result.model)], opt.state_dict(), result.losses, result.valid_losses, result.tokens, torch.get_rng_state()))
    def damage(self, rng, folder):
        folder.mkdir(); path, how = folder/"state.pt", rng.random()
        path.write_bytes(self.bytes)
        if how < 0.05: return replace_by(rng, path)
        if how < 0.1: return # as it was
        blob = damage_zip(rng, self.bytes[40:], self.marker) if how < 0.5 else saved(damage_tree(rng, self.dict))
        path.write_bytes(rng.choice([blob, self.bytes[:40] + blob]) if how < 0.7 else rng.choice(BYTES)(rng, self.bytes))
    def check(self, rng, folder):
        self.before = self.picture(*self.now)
        try: load_finetune_state(folder/"state.pt", *self.now, self.run)
        except ValueError as e: # "another run" is a ValueError
            assert same(self.picture(*self.now), self.before), "half of a state was taken"
            if "another run" in str(e): raise BadFileError from e
            raise
        got, said = self.picture(*self.now), self.dict
        torch.manual_seed(0); self.now = self.fresh()
        assert same(got[0], said["params"]) and same(got[2], said["result"]["losses"]), "not what the file says"
        assert all(isinstance(x, float) for x in got[2]) and isinstance(got[4], int), "numbers that are none"

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)

KINDS = {"adapter, ours": (Adapters, True), "adapter, PEFT's": (Adapters, False), "checkpoint": (Checkpoints, ".safetensors"), "checkpoint, .pt": (Checkpoints, ".pt"),
         "examples": (Examples, None), "tokenizer": (Tokenizers, None), "state of a run": (States, None)}

# The child

class TookTooLong(BaseException): pass

def one_case(kind, maker, i, home, memory):
    "`loaded`, `refused`, or what is wrong."
    rng, folder = random.Random(f"{kind} {i}"), home/f"case{i}"
    maker.damage(rng, folder)
    memory(limited=not huge(folder)) # mapping a huge file counts as memory, reading it does; `test_memory` looks at what was used
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True) # for code that no signal reaches
        maker.check(rng, folder)
        how = "loaded"
    except BadFileError as e: how = f"refused, but it needed the memory: {e}" if re.search("allocate|enough memory", str(e)) else "refused"
    except FileNotFoundError as e: how = "refused" if kind not in list(KINDS)[:2] and not (folder/os.listdir(folder)[0]).is_file() else repr(e)
    except BaseException as e: how = f"{type(e).__name__}: {str(e)[:300]}"
    finally: signal.setitimer(signal.ITIMER_REAL, 0); faulthandler.cancel_dump_traceback_later()
    if maker.marker.exists(): maker.marker.unlink(); how = "CODE WAS RUN"
    return how

def memory_used():
    "Bytes: data, resident now, resident at most. (ru_maxrss would count what the parent had when it started us.)"
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if "kB" in line)
    return {k: int(status[k].split()[0]) << 10 for k in ("VmData", "VmRSS", "VmHWM")}

def main(home, only=None, number=None):
    warnings.simplefilter("ignore"); torch.set_num_threads(1)
    def too_long(*_): raise TookTooLong(f"more than {SECONDS} s")
    signal.signal(signal.SIGALRM, too_long)
    makers = {}
    for k, (make, how) in KINDS.items():
        if not only or k == only: (home/k).mkdir(); makers[k] = make(home/k, how)
    used = memory_used()
    memory = lambda limited: resource.setrlimit(resource.RLIMIT_DATA, (used["VmData"] + ROOM if limited else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    report = {}
    for k, maker in makers.items():
        count, wrong = Counter(), []
        for i in range(CASES[k]) if number is None else [int(number)]:
            (home/"now").write_text(f"{k} {i}")
            how = one_case(k, maker, i, home/k, memory)
            count[how if how in ("loaded", "refused") else "wrong"] += 1
            if how not in ("loaded", "refused"): wrong.append((i, how))
            if number is None: shutil.rmtree(home/k/f"case{i}")
        report[k] = dict(count=count, wrong=wrong)
    return dict(kinds=report, grown=memory_used()["VmHWM"] - used["VmRSS"])

# The tests

@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    memory = Path("/dev/shm") # thousands of folders, and no disk
    home = Path(tempfile.mkdtemp(dir=memory)) if memory.is_dir() else tmp_path_factory.mktemp("fuzz")
    try: return child_report(home)
    finally: shutil.rmtree(home)

def child_report(home):
    done = subprocess.run([sys.executable, __file__, home], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"the child died ({done.returncode}) in case {(home/'now').read_text() if (home/'now').exists() else '?'}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)

@pytest.mark.parametrize("kind", CASES)
def test_nothing_but_numbers_or_bad_file_error(fuzz, record, kind):
    r = fuzz["kinds"][kind]
    assert not r["wrong"], f"{len(r['wrong'])} cases, the first ones: {r['wrong'][:20]}"
    tried = sum(r["count"].values())
    assert tried == CASES[kind] and min(r["count"]["loaded"], r["count"]["refused"]) >= tried // 50, r["count"] # damage that is never seen, or always, says nothing
    record("fuzz", kind, tried=tried, wrong=0)

def test_memory(fuzz): assert fuzz["grown"] < ROOM

def test_no_code_is_read_from_files():
    "In the package there is no pickle.load, eval or exec, and torch.load reads weights only."
    for path in Path(tiny_llm.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call): continue
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__") and not re.search(r"(pickle|marshal|shelve|joblib|yaml)\.(load|loads|open|Unpickler)$", called), (path.name, node.lineno, called)
            if called == "torch.load": assert given.get("weights_only") == "True", (path.name, node.lineno)

if __name__ == "__main__": print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:]), indent=1))
