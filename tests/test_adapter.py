"Adapter files, loading and refusing, swapping, merging and un-merging."
import copy, json, multiprocessing, os, pickle, re, threading
import pytest, torch, torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from tiny_llm.adapter import (adapter_config, adapter_tensors, disable_lora, load_adapter, load_with_lora, merge_lora, merged_linear,
                              merged_state_dict, read_adapter, save_adapter, swap_adapter, unmerge_lora)
from tiny_llm.files import BadFileError
from tiny_llm.gpt import GPT, GPTConfig, fingerprint, save_checkpoint
from tiny_llm.lora import TOLERANCE, LoRALinear, add_lora_to_model, lora_modules, lora_parameters, remove_lora

SHAPE = dict(vocab_size=97, max_seq_len=64, d_model=32, n_heads=4, n_layers=2, d_mlp=48)
IDS = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0))
QKV = "base_model.model.blocks.0.attn.qkv.lora_A.weight"
CONFIG, WEIGHTS, NOTE = FILES = "adapter_config.json", "adapter_model.safetensors", "tiny_llm.json"

def small(seed=0, **how):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SHAPE, **how})).eval()

def trained(model=None, **how):
    "A model with LoRA after three real optimizer steps, so that B is not 0 and A not where it started."
    model = add_lora_to_model(model or small(), **how)
    opt = torch.optim.AdamW(lora_parameters(model), lr=0.1)
    for _ in range(3):
        model(torch.arange(20)[None]).pow(2).sum().backward()
        opt.step(); opt.zero_grad()
    return model

@torch.no_grad()
def logits(model): return model(IDS.to(next(model.parameters()).device))

def picture(model):
    "Everything that an error must leave alone: values, kinds of modules, which parameters train, modes, identities."
    return ({k: v.clone() for k, v in model.state_dict().items()}, [(n, type(m), m.training, id(m)) for n, m in model.named_modules()],
            [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()])

def same(a, b): return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())

def equal_states(a, b): return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())

# Saving

@pytest.mark.parametrize("targets", ["attn.qkv", ("attn.qkv", "attn.W_o"), "all-linear", re.compile(r"blocks\.1\."), re.compile(r"0.*up|1.*down")])
@pytest.mark.parametrize("r, alpha", [(1, 1), (4, 6.5)])
def test_round_trip(tmp_path, targets, r, alpha):
    model = trained(r=r, alpha=alpha, targets=targets, dropout=0.1)
    save_adapter(model, tmp_path/"deep"/"a")
    again = load_adapter(small(), tmp_path/"deep"/"a")
    assert equal_states(again.state_dict(), model.state_dict()) and torch.equal(logits(again), logits(model))
    assert adapter_config(again) == adapter_config(model) and lora_modules(again).keys() == lora_modules(model).keys()
    assert {n.rsplit(".", 1)[-1] for n, p in again.named_parameters() if p.requires_grad} == {"A", "B"}

@pytest.mark.filterwarnings("ignore:the rank is larger")
@pytest.mark.parametrize("r", [SHAPE["d_model"], 2 * SHAPE["d_model"]])
def test_the_largest_rank_and_a_larger_one(tmp_path, r):
    model = trained(r=r, targets="attn.W_o")
    save_adapter(model, tmp_path/"a")
    assert torch.equal(logits(load_adapter(small(), tmp_path/"a")), logits(model))

@pytest.mark.parametrize("ranks, written", [({"qkv": 5}, ["attn.qkv"]), ({"blocks.0.attn.qkv": 5}, [r"^blocks\.0\.attn\.qkv"]),
    ({"blocks.0.attn.qkv": 5, "blocks.1.attn.qkv": 6}, [r"^blocks\.0\.attn\.qkv", r"^blocks\.1\.attn\.qkv"])], ids=["all", "one", "two that differ"])
def test_ranks_lead_back_to_their_layers(tmp_path, ranks, written):
    model = trained(r=3, targets=("attn.qkv", "attn.W_o", "mlp.up"), rank_pattern=ranks)
    assert sorted(adapter_config(model)["rank_pattern"]) == written
    save_adapter(model, tmp_path/"a")
    assert torch.equal(logits(load_adapter(small(), tmp_path/"a")), logits(model))

def test_targets_lead_back_to_the_wrapped_layers():
    assert adapter_config(trained(targets="all-linear"))["target_modules"] == ["W_o", "down", "gate", "qkv", "up"]
    names = adapter_config(trained(targets=re.compile(r"blocks\.1\.")))["target_modules"]
    assert names == [f"blocks.1.{n}" for n in ("attn.W_o", "attn.qkv", "mlp.down", "mlp.gate", "mlp.up")]

def test_short_targets_never_lead_to_more_layers_than_were_wrapped():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.ModuleDict({"up": nn.Linear(8, 8)}), nn.ModuleDict({"up": nn.Linear(8, 8)})
    assert adapter_config(add_lora_to_model(Twins(), r=2, targets="first.up"))["target_modules"] == ["first.up"]
    assert adapter_config(add_lora_to_model(Twins(), r=2, targets="up"))["target_modules"] == ["up"]

def test_files_have_pefts_names(tmp_path):
    model = trained(); save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == list(FILES)
    state = load_file(tmp_path/WEIGHTS)
    assert state[QKV].shape == (8, 32) and state[QKV.replace("_A", "_B")].shape == (96, 8) and len(state) == 8
    with safe_open(tmp_path/WEIGHTS, "pt") as f: assert f.metadata() == {"format": "pt"}
    assert json.loads((tmp_path/NOTE).read_text())["base_fingerprint"] == fingerprint(small())

def test_a_wrong_state_of_the_model_is_not_saved(tmp_path):
    good = trained(); save_adapter(good, tmp_path); files = [(tmp_path/f).read_bytes() for f in FILES]
    mixed, broken, dropping, scaled = trained(), trained(), trained(), trained()
    remove = list(lora_modules(mixed)); layer = lora_modules(mixed)[remove[0]]
    layer.use_rslora, lora_modules(dropping)[remove[1]].dropout.p = True, 0.5
    lora_modules(scaled)[remove[2]].scaling *= 0.5
    with torch.no_grad(): lora_modules(broken)[remove[-1]].B[0, 0] = float("nan")
    for model, why in ((small(), "no LoRA"), (merge_lora(trained()), "merged"), (mixed, "rsLoRA"), (broken, "NaN"), (dropping, "dropout"),
                       (scaled, "scaling of .*multiply B")):
        with pytest.raises(ValueError, match=why): save_adapter(model, tmp_path)
    assert [(tmp_path/f).read_bytes() for f in FILES] == files and sorted(os.listdir(tmp_path)) == list(FILES)

@pytest.mark.parametrize("dies_at", [0, 1, 2, 3])
@pytest.mark.parametrize("change", [dict(r=8, alpha=32), dict(r=4), dict(targets="mlp.up"), dict()])
def test_killed_while_saving(tmp_path, monkeypatch, dies_at, change):
    "The rename of the folder is the moment of the save: before it the old adapter is there, after it the new one, never a mixture."
    old, new = trained(), trained(small(), **change)
    with torch.no_grad(): lora_modules(new).popitem()[1].B.add_(1)
    save_adapter(old, tmp_path)
    calls = []
    def dying(how, *args):
        calls.append(1)
        if len(calls) == dies_at + 1: raise KeyboardInterrupt
        how(*args)
    for name in ("rename", "replace"): monkeypatch.setattr(f"os.{name}", lambda *args, how=getattr(os, name): dying(how, *args))
    with pytest.raises(KeyboardInterrupt): save_adapter(new, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ([".new"] if dies_at else []) + list(FILES)
    monkeypatch.undo()
    assert torch.equal(logits(load_adapter(small(), tmp_path)), logits(new if dies_at else old))
    save_adapter(old, tmp_path) # finishes the moving first
    assert torch.equal(logits(load_adapter(small(), tmp_path)), logits(old)) and sorted(os.listdir(tmp_path)) == list(FILES)

def test_disk_full_keeps_the_old_adapter(tmp_path, monkeypatch):
    old = trained(); save_adapter(old, tmp_path)
    def full(*args, **kw): raise OSError("no space left on device")
    monkeypatch.setattr("tiny_llm.adapter.write_tensors", full)
    with pytest.raises(OSError, match="space"): save_adapter(trained(r=4), tmp_path)
    assert torch.equal(logits(load_adapter(small(), tmp_path)), logits(old)) and sorted(os.listdir(tmp_path)) == list(FILES)

def test_saving_where_a_file_is(tmp_path):
    (tmp_path/"a").write_text("mine")
    with pytest.raises(OSError): save_adapter(trained(), tmp_path/"a")
    assert (tmp_path/"a").read_text() == "mine"

# Loading: what must be refused

def config_with(**fields):
    def change(path): (path/CONFIG).write_text(json.dumps({**json.loads((path/CONFIG).read_text()), **fields}))
    return change

def text(s):
    def change(path): (path/CONFIG).write_text(s)
    return change

def tensors_with(change, note=False):
    "Other tensors, and our note gone unless told: with it the checksum alone would say everything."
    def apply(path):
        save_file(change(load_file(path/WEIGHTS)), path/WEIGHTS)
        if not note: (path/NOTE).unlink()
    return apply

def note_with(**fields):
    def change(path): (path/NOTE).write_text(json.dumps({**json.loads((path/NOTE).read_text()), **fields}))
    return change

def note_text(s):
    def change(path): (path/NOTE).write_text(s)
    return change

def bytes_of(change):
    def apply(path): (path/WEIGHTS).write_bytes(change((path/WEIGHTS).read_bytes()))
    return apply

def without(word): return tensors_with(lambda t: {k: v for k, v in t.items() if word not in k})

def foreign_config(**fields):
    "Another configuration in a folder that PEFT wrote, where no note says what it should be."
    def apply(path): config_with(**fields)(path); (path/NOTE).unlink()
    return apply

DAMAGE = { # what happened: (how, part of the message)
    "cut at the end": (bytes_of(lambda b: b[:-10]), "not a usable adapter"),
    "cut in the header": (bytes_of(lambda b: b[:20]), "not a usable adapter"),
    "empty": (bytes_of(lambda b: b""), "not a usable adapter"),
    "foreign file": (bytes_of(lambda b: b"PK\x03\x04" + b"x" * 500), "not a usable adapter"),
    "one tensor missing": (without(QKV), "missing tensors"),
    "a layer missing": (without("blocks.1.attn.W_o"), "missing tensors"),
    "all layers of a name missing": (without("W_o"), "missing tensors"),
    "no tensors": (without(""), "missing tensors"),
    "extra layer": (tensors_with(lambda t: {**t, QKV.replace("0", "9"): t[QKV].clone()}), "unexpected tensors"),
    "foreign name": (tensors_with(lambda t: {**t, "blocks.0.attn.qkv.bias": torch.zeros(3)}), "unexpected tensors"),
    "wrong shape": (tensors_with(lambda t: {**t, QKV: torch.zeros(8, 31)}), "shape"),
    "NaN": (tensors_with(lambda t: {**t, QKV: t[QKV] * float("nan")}), "finite"),
    "infinity": (tensors_with(lambda t: {**t, QKV: t[QKV] / 0}), "finite"),
    "whole numbers": (tensors_with(lambda t: {**t, QKV: t[QKV].long()}), "floating"),
    "one bit of a number": (bytes_of(lambda b: b[:-1] + bytes([b[-1] ^ 1])), "SHA-256"),
    "other numbers": (tensors_with(lambda t: {**t, QKV: t[QKV] + 1}, note=True), "SHA-256"),
    "other fingerprint": (note_with(base_fingerprint="0" * 64), "another base"), "other checksum": (note_with(weights_sha256="0" * 64), "SHA-256"),
    "note is no JSON": (note_text("{"), "not a usable adapter"), "note is a list": (note_text("[1]"), "tiny_llm.json is damaged"),
    "note lacks a field": (note_text('{"base_fingerprint": "0"}'), "tiny_llm.json is damaged"),
    "note lacks a field of the configuration": (note_with(config={"r": 8}), "tiny_llm.json is damaged"),
    "a key twice": (text('{"r": 8, "r": 4}'), "'r' stands twice"),
    "JSON is a list": (text("[]"), "list"), "JSON is a number": (text("3"), "int"), "JSON is null": (text("null"), "NoneType"),
    "no JSON": (text("{"), "not a usable adapter"), "empty JSON": (text("{}"), "target_modules=.None"), "deep JSON": (text("[" * 100_000), "not a usable adapter"),
    "JSON is not UTF-8": (lambda p: (p/CONFIG).write_bytes(b"\xff\xfe\x00"), "not a usable adapter"),
    "rank of another save": (config_with(r=4), "different saves.*'r'"),
    "alpha of another save": (config_with(lora_alpha=32), "different saves.*lora_alpha"),
    "targets of another save": (config_with(target_modules=["attn.qkv"]), "different saves.*target_modules"),
    "rank is text": (foreign_config(r="8"), "r='8'"), "rank is a fraction": (foreign_config(r=8.5), "r='8.5'"),
    "rank 0": (foreign_config(r=0), "rank 0"), "rank 4": (foreign_config(r=4), "shape"), "a rank of one layer": (foreign_config(rank_pattern={"qkv": 4}), "shape"), "rank too high": (foreign_config(r=10**12), "expected .10*"), "rank is true": (foreign_config(r=True), "r='True'"),
    "alpha is text": (foreign_config(lora_alpha="x"), "lora_alpha"), "alpha is NaN": (foreign_config(lora_alpha=float("nan")), "lora_alpha"), "alpha 0": (foreign_config(lora_alpha=0), "lora_alpha"),
    "dropout 2": (foreign_config(lora_dropout=2), "lora_dropout"), "dropout is text": (foreign_config(lora_dropout="x"), "not a usable"),
    "no targets": (foreign_config(target_modules=None), "target_modules"), "targets are numbers": (foreign_config(target_modules=[1]), "target_modules"),
    "fewer targets": (foreign_config(target_modules=["attn.qkv"]), "unexpected tensors"), "more targets": (foreign_config(target_modules="all-linear"), "missing tensors"),
    "unknown targets": (foreign_config(target_modules=["q_proj"]), "attn.qkv"), "tied head": (foreign_config(target_modules=["lm_head"]), "shared"),
    "IA3": (foreign_config(peft_type="IA3"), "IA3"), "bias": (foreign_config(bias="all"), "bias"),
    **{k: (foreign_config(**{k: v}), k) for k, v in dict(use_dora=True, use_bdlora=True, rank_pattern={"qkv": 4.5}, alpha_pattern={"qkv": -4},
                                                       modules_to_save=["norm_f"], lora_bias=True, init_lora_weights="pissa").items()},
    "a rank pattern that is no object": (foreign_config(rank_pattern=[1]), "rank_pattern"), "an endless pattern": (foreign_config(target_modules=r"(a|aa|b|l|o|c|k|s|\.|0|t|n|q|v|.|\w|\S)+\d"), "cannot be used"),
    "a pattern that is none": (foreign_config(rank_pattern={"(": 4}), "cannot be used"), "an unknown switch": (foreign_config(use_magic=True), "use_magic"),
    "rsLoRA of another save": (config_with(use_rslora=True), "different saves.*use_rslora"), "all blocks left out": (foreign_config(layers_to_transform=[7]), "no linear layer"),
}

@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("how", [load_adapter, swap_adapter])
def test_a_bad_adapter_is_refused_and_changes_nothing(tmp_path, what, how):
    save_adapter(trained(), tmp_path)
    damage, why = DAMAGE[what]; damage(tmp_path)
    for model in [trained().train()] if how is swap_adapter else [small(), trained()]:
        before = picture(model)
        with pytest.raises(BadFileError, match=why): how(model, tmp_path)
        assert same(picture(model), before)

def test_what_peft_writes_is_read(tmp_path):
    "It has no fingerprint and more fields. The damage above is thus not in the absent header."
    model = trained(); save_adapter(model, tmp_path)
    foreign_config(layers_to_transform=None, rank_pattern={}, modules_to_save=None, init_lora_weights=True)(tmp_path)
    assert torch.equal(logits(load_adapter(small(), tmp_path)), logits(model))

@pytest.mark.parametrize("other", [dict(seed=1), dict(norm_eps=1e-6), dict(n_layers=3), dict(d_model=64), dict(n_heads=2)])
def test_another_base(tmp_path, other):
    save_adapter(trained(), tmp_path)
    for model in (small(**other), trained(small(**other))):
        before = picture(model)
        with pytest.raises(BadFileError, match="another base"): load_adapter(model, tmp_path)
        assert same(picture(model), before)

def test_one_bit_of_the_base_is_noticed(tmp_path):
    save_adapter(trained(), tmp_path)
    model = small()
    with torch.no_grad(): model.norm_f.weight[0] = torch.nextafter(model.norm_f.weight[0], torch.tensor(2.0))
    with pytest.raises(BadFileError, match="another base"): load_adapter(model, tmp_path)

def test_things_that_are_not_there_or_not_a_folder(tmp_path):
    model = trained(); save_adapter(model, tmp_path/"a"); (tmp_path/"file").write_text("x")
    before = picture(model)
    with pytest.raises(FileNotFoundError, match="none"): load_adapter(model, tmp_path/"none")
    with pytest.raises(BadFileError, match="is a file"): load_adapter(model, tmp_path/"file")
    with pytest.raises(BadFileError, match="is a file"): load_adapter(model, tmp_path/"a"/WEIGHTS)
    (tmp_path/"a"/WEIGHTS).unlink()
    with pytest.raises(BadFileError, match=WEIGHTS): load_adapter(model, str(tmp_path/"a"))
    (tmp_path/"a"/WEIGHTS).mkdir()
    with pytest.raises(BadFileError, match=WEIGHTS): load_adapter(model, tmp_path/"a")
    (tmp_path/"a"/"adapter_model.bin").write_bytes(b"x")
    with pytest.raises(BadFileError, match="pickle"): load_adapter(model, tmp_path/"a")
    assert same(picture(model), before)

@pytest.mark.parametrize("how", [dict(r=4), dict(alpha=8), dict(targets="attn.qkv"), dict(targets="all-linear")])
def test_loading_onto_other_lora_layers_is_refused(tmp_path, how):
    save_adapter(trained(), tmp_path)
    model = trained(**how); before = picture(model)
    with pytest.raises(BadFileError, match="swap_adapter"): load_adapter(model, tmp_path)
    assert same(picture(model), before)

def test_loading_onto_the_same_lora_layers_keeps_the_parameters(tmp_path):
    model = trained(); save_adapter(model, tmp_path)
    other = add_lora_to_model(small()); own = [id(p) for p in lora_parameters(other)]
    assert torch.equal(logits(load_adapter(other, tmp_path)), logits(model)) and [id(p) for p in lora_parameters(other)] == own

def test_loading_keeps_mode_and_follows_the_base(tmp_path):
    save_adapter(trained(), tmp_path)
    assert all(m.training for m in load_adapter(small().train(), tmp_path).modules())
    assert not any(m.training for m in load_adapter(small(), tmp_path).modules())

def test_load_with_lora(tmp_path):
    model = trained(); save_adapter(model, tmp_path/"a"); save_checkpoint(small(), tmp_path/"base.safetensors")
    loaded = load_with_lora(tmp_path/"base.safetensors", tmp_path/"a", device="cpu")
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training and {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert {p.device.type for p in load_with_lora(tmp_path/"base.safetensors", tmp_path/"a", device="meta").parameters()} == {"meta"}
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert {p.device.type for p in load_with_lora(str(tmp_path/"base.safetensors"), str(tmp_path/"a")).parameters()} == {expected}
    with pytest.raises(FileNotFoundError): load_with_lora(tmp_path/"none.safetensors", tmp_path/"a")

# Swapping

@pytest.mark.parametrize("how", [dict(), dict(r=3, alpha=5), dict(targets="all-linear"), dict(targets=re.compile(r"blocks\.1\.mlp"), r=2, dropout=0.2)])
def test_swap_there_and_back(tmp_path, how):
    first, second = trained(), trained(**how)
    with torch.no_grad(): lora_modules(second).popitem()[1].B.add_(1)
    save_adapter(first, tmp_path/"1"); save_adapter(second, tmp_path/"2")
    model = load_adapter(small(), tmp_path/"1")
    assert swap_adapter(model, tmp_path/"2") is model and equal_states(model.state_dict(), second.state_dict())
    assert torch.equal(logits(model), logits(second)) and not torch.allclose(logits(model), logits(first), atol=1e-3)
    assert adapter_config(model) == adapter_config(second) and len([p for p in model.parameters() if p.requires_grad]) == len(lora_parameters(model))
    assert torch.equal(logits(swap_adapter(model, tmp_path/"1")), logits(first)) and fingerprint(model) == fingerprint(small())

def test_swap_with_a_known_fingerprint(tmp_path, monkeypatch):
    model = trained(); save_adapter(model, tmp_path); known = fingerprint(model)
    def forbidden(*args): raise AssertionError("computed the fingerprint")
    monkeypatch.setattr("tiny_llm.adapter._print", forbidden)
    swap_adapter(model, tmp_path, known)
    with pytest.raises(BadFileError, match="another base"): swap_adapter(model, tmp_path, "0" * 64)

def test_swap_keeps_the_mode_and_needs_an_adapter(tmp_path):
    model = trained(); save_adapter(model, tmp_path)
    assert all(m.training for m in swap_adapter(model.train(), tmp_path).modules())
    with pytest.raises(ValueError, match="load_adapter"): swap_adapter(small(), tmp_path)
    for f in (swap_adapter, load_adapter):
        with pytest.raises(ValueError, match="merged"): f(merge_lora(trained()), tmp_path)

# Switching off

def test_disable():
    model = trained(); with_lora, before = logits(model), picture(model)
    with disable_lora(model):
        assert torch.equal(logits(model), logits(small())) and not lora_modules(model)
        with disable_lora(model): assert not lora_modules(model)
    assert same(picture(model), before)
    with pytest.raises(RuntimeError), disable_lora(model): raise RuntimeError
    assert torch.equal(logits(model), with_lora)
    with disable_lora(small()) as plain: assert isinstance(plain, GPT)

def test_a_merged_model_cannot_be_switched_off():
    with pytest.raises(ValueError, match="merged"), disable_lora(merge_lora(trained())): pass

# Merging

def test_merge_after_real_training():
    "After litgpt's test: train, see that the base is untouched, merge, see that a second merge cannot happen, then the algebra."
    model = small(); base = copy.deepcopy(model)
    trained(model, targets="all-linear"); with_lora, before = logits(model), picture(model)
    assert all(m.B.abs().max() > 0 for m in lora_modules(model).values()) and (with_lora - logits(base)).abs().max() > 0.1
    assert fingerprint(model) == fingerprint(base)
    parts = {n: (m.A.detach().clone(), m.B.detach().clone()) for n, m in lora_modules(model).items()}
    assert merge_lora(model) is model
    assert_close(logits(model), with_lora, **TOLERANCE[torch.float32])
    assert list(model.state_dict()) == list(base.state_dict()) and not lora_modules(model)
    for n, (A, B) in parts.items():
        W = base.get_submodule(n).weight
        assert_close(model.get_submodule(n).weight, W + 2.0 * B @ A, **TOLERANCE[torch.float32])
        assert (model.get_submodule(n).weight - W).abs().max() > 1e-3
    merged = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="merged"): merge_lora(model)
    with pytest.raises(ValueError, match="merged"): adapter_config(model)
    assert equal_states(model.state_dict(), merged)
    assert same(picture(unmerge_lora(model)), before) and torch.equal(logits(model), with_lora)
    assert torch.equal(logits(remove_lora(model)), logits(base))
    with pytest.raises(ValueError, match="not merged"): unmerge_lora(model)

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape, r", [((24, 40), 4), ((40, 24), 1), ((32, 32), 32)])
def test_merged_linear(dtype, bias, shape, r):
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(*shape, bias=bias), r=r, alpha=3 * r, dropout=0.5).to(dtype), torch.randn(2, 5, shape[0]).to(dtype)
    with torch.no_grad(): layer.B.normal_(std=0.5)
    layer.eval(); W = layer.base.weight.clone()
    merged = merged_linear(layer)
    assert not torch.allclose(layer(x), layer.base(x), **TOLERANCE[dtype])
    assert_close(merged(x), layer(x), **TOLERANCE[dtype])
    assert torch.equal(layer.base.weight, W) and type(merged) is nn.Linear and merged.weight.dtype == dtype
    assert not any(p.requires_grad for p in merged.parameters()) and not hasattr(merged, "dropout")

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_in_every_type(dtype):
    "On whole logits: not farther from the float64 truth than the unmerged model, which rounds as well."
    model = trained().to(dtype)
    truth, before, base = logits(copy.deepcopy(model).double()), logits(model), logits(remove_lora(copy.deepcopy(model)))
    def off(a): return (a.double() - truth).pow(2).mean().sqrt().item()
    merge_lora(model)
    assert off(logits(model)) < 1.5 * off(before) + 1e-6 and off(base) > 10 * off(before)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(logits(unmerge_lora(model)), before)

def test_merge_keeps_mode_and_freezes():
    for training in (True, False):
        model = merge_lora(trained(dropout=0.5).train(training))
        assert {m.training for m in model.modules()} == {training} and not any(p.requires_grad for p in model.parameters())
        unmerge_lora(model)
        assert {m.training for m in model.modules()} == {training}
        assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B"}

def test_merge_with_dropout_takes_no_dropout():
    model = trained(dropout=0.5); expected = logits(model)
    assert_close(logits(merge_lora(model.train()).eval()), expected, **TOLERANCE[torch.float32])

@pytest.mark.parametrize("where, value", [("B", float("nan")), ("A", float("inf")), ("base.weight", float("-inf")), ("B", 3e38)])
def test_merge_refuses_what_is_not_finite(where, value):
    model = trained(); layer = list(lora_modules(model).values())[-1]
    with torch.no_grad(): layer.get_parameter(where)[0, 0] = value; layer.A[0, 0] += 10
    before = [(n, type(m)) for n, m in model.named_modules()]
    for f in (merge_lora, merged_state_dict):
        with pytest.raises(ValueError, match="NaN"): f(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == before

def test_a_tied_head_is_refused_and_an_untied_one_merges():
    with pytest.raises(ValueError, match="tok_emb"): add_lora_to_model(small(), targets="lm_head")
    by_hand = small(); by_hand.lm_head = LoRALinear(by_hand.lm_head)
    for f in (merge_lora, merged_state_dict):
        with pytest.raises(ValueError, match="tok_emb"): f(by_hand)
    untied = trained(small(tie_weights=False), targets="lm_head"); expected = logits(untied)
    assert_close(logits(merge_lora(untied)), expected, **TOLERANCE[torch.float32])

def test_merged_state_dict():
    model = trained(targets="all-linear"); before, expected = picture(model), logits(model)
    state = merged_state_dict(model)
    assert same(picture(model), before) and list(state) == list(small().state_dict())
    plain = small(seed=5); plain.load_state_dict(state, strict=True)
    assert_close(logits(plain), expected, **TOLERANCE[torch.float32])
    assert equal_states(state, merge_lora(model).state_dict()) and not any(v.requires_grad for v in state.values())
    for bad, why in ((small(), "no LoRA"), (model, "merged")):
        with pytest.raises(ValueError, match=why): merged_state_dict(bad)

# A merged model that is copied, stored, cast or changed

@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_merged_model(copied):
    model = trained(); with_lora = logits(model); merge_lora(model)
    other = copied(model)
    assert torch.equal(logits(unmerge_lora(other)), with_lora) and not lora_modules(model)
    with torch.no_grad(): lora_parameters(other)[1].zero_()
    assert torch.equal(logits(unmerge_lora(model)), with_lora)

def test_the_old_layers_are_in_no_list():
    model = merge_lora(trained())
    assert list(model.state_dict()) == list(small().state_dict()) and not lora_parameters(model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in small().parameters())

def test_unmerge_follows_a_cast_model():
    model = trained(); expected = copy.deepcopy(model).bfloat16()
    unmerge_lora(merge_lora(model).bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert equal_states(model.state_dict(), expected.state_dict()) and torch.equal(logits(model), logits(expected))

def test_there_and_back_in_type_loses_nothing():
    model = trained(); before = {k: v.clone() for k, v in model.state_dict().items() if ".base." in k or k[-1] in "AB"}
    unmerge_lora(merge_lora(model).bfloat16().float())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())

def test_a_second_adapter_on_a_merged_model_is_refused_before_it_is_trained(tmp_path):
    model = merge_lora(trained()); before = picture(model)
    with pytest.raises(ValueError, match="keep=False"): add_lora_to_model(model)
    with pytest.raises(ValueError, match="keep=False"): add_lora_to_model(nn.ModuleDict(dict(a=model, b=small())), targets="qkv")
    assert same(picture(model), before) and len(lora_modules(unmerge_lora(model))) == 4

@pytest.mark.parametrize("at_once", [True, False])
def test_a_final_merge_takes_a_second_adapter(tmp_path, at_once):
    model = trained() if at_once else merge_lora(trained())
    base = copy.deepcopy(merge_lora(model, keep=False)); expected = logits(model)
    assert not [k for k in vars(model) if "lora" in k or "merge" in k] and not model._forward_hooks and not model._forward_pre_hooks
    with pytest.raises(ValueError, match="for good"): unmerge_lora(model)
    save_adapter(trained(model, r=2), tmp_path)
    assert not torch.allclose(logits(model), expected) and torch.equal(logits(load_adapter(base, tmp_path)), logits(model))

def test_a_merged_checkpoint_is_a_plain_one(tmp_path):
    from tiny_llm.gpt import load_checkpoint
    model = merge_lora(trained()); save_checkpoint(model, tmp_path/"merged.safetensors")
    assert torch.equal(logits(load_checkpoint(tmp_path/"merged.safetensors")), logits(model))

# The adapters that ship

@pytest.mark.parametrize("name", ["instruct", "moral"])
def test_shipped_adapters(name):
    from tiny_llm.data import ASSETS
    model = load_with_lora(None, ASSETS/"adapters"/name, device="cpu"); config = adapter_config(model)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 16, ["W_o", "qkv"])
    assert sum(p.stat().st_size for p in (ASSETS/"adapters"/name).iterdir()) < 320_000
    with torch.no_grad():
        with_lora = model(IDS)
        with disable_lora(model): assert (model(IDS) - with_lora).abs().max() > 0.1
        assert_close(merge_lora(model)(IDS), with_lora, **TOLERANCE[torch.float32])

def test_peft_reads_it_and_we_read_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    model = trained(r=4, alpha=6); save_adapter(model, tmp_path/"ours")
    config = peft.LoraConfig.from_pretrained(tmp_path/"ours")
    theirs = peft.PeftModel(small(), config).eval()
    loaded = peft.set_peft_model_state_dict(theirs, load_file(tmp_path/"ours"/WEIGHTS))
    assert not loaded.unexpected_keys and not any("lora" in k for k in loaded.missing_keys)
    assert_close(logits(theirs), logits(model), **TOLERANCE[torch.float32])
    theirs.save_pretrained(tmp_path/"theirs")
    assert_close(logits(load_adapter(small(), tmp_path/"theirs")), logits(model), **TOLERANCE[torch.float32])

def test_adapter_tensors_are_plain():
    state = adapter_tensors(trained())
    assert not any(t.requires_grad for t in state.values()) and all(t.is_contiguous() for t in state.values())

def test_read_adapter(tmp_path):
    model = trained(); save_adapter(model, tmp_path)
    config, tensors, note = read_adapter(tmp_path)
    assert config == adapter_config(model) and note["base_fingerprint"] == fingerprint(model)
    assert all(torch.equal(tensors[f"{n}.{ab}"], getattr(m, ab)) for n, m in lora_modules(model).items() for ab in "AB")

def test_a_target_that_fits_nothing_is_told_and_others_are_not(tmp_path, recwarn):
    save_adapter(trained(), tmp_path/"a")
    load_adapter(small(), tmp_path/"a")
    assert not recwarn.list
    config = json.loads((tmp_path/"a"/CONFIG).read_text())
    (tmp_path/"a"/CONFIG).write_text(json.dumps({**config, "target_modules": [*config["target_modules"], "nowhere"]}))
    (tmp_path/"a"/NOTE).unlink()
    with pytest.warns(UserWarning, match="nowhere.* fit no layer"): load_adapter(small(), tmp_path/"a")

def test_a_folder_in_place_of_the_note(tmp_path):
    save_adapter(trained(), tmp_path/"a")
    (tmp_path/"a"/NOTE).unlink(), (tmp_path/"a"/NOTE).mkdir()
    with pytest.raises(ValueError, match="is no plain file"): read_adapter(tmp_path/"a")

# What is saved can be loaded

class Odd(nn.Module):
    "Layers whose names mean something in a regular expression, end alike, or look like parts of an adapter."
    NAMES = "a+b", "a", "x(y", "[z]", "n\nl", "base", "lora_A", "é"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.first = nn.Linear(8, 8), nn.ModuleDict({"up": nn.Linear(8, 8)})
        self.odd = nn.ModuleDict({n: nn.Linear(8, 8) for n in self.NAMES})
        self.A = nn.Parameter(torch.randn(8))
    def forward(self, x):
        for m in (self.up, *self.first.values(), *self.odd.values()): x = x + m(x).tanh()
        return x * self.A

@pytest.mark.parametrize("targets", ["a+b", "[z]", "x(y", "n\nl", "base", "lora_A", "é", re.compile(r"^up$"), re.compile("^odd"), "all-linear"], ids=repr)
@pytest.mark.parametrize("uneven", [{}, dict(rank_pattern={r"odd\.a\+b|up": 3}), dict(alpha_pattern={r"odd\.a\+b|up": 3, r"odd\.x.*": 5})])
def test_names_with_special_characters(tmp_path, targets, uneven):
    names = lora_modules(add_lora_to_model(Odd(), r=2, targets=targets))
    uneven = {k: {p: v for p, v in pattern.items() if any(re.fullmatch(p, n) for n in names)} for k, pattern in uneven.items()}
    model, x = add_lora_to_model(Odd(), r=2, targets=targets, **uneven), torch.randn(3, 8)
    with torch.no_grad(): [p.normal_(std=0.3) for p in lora_parameters(model)]
    save_adapter(model, tmp_path)
    again = load_adapter(Odd(), tmp_path)
    assert {n: (m.r, m.scaling) for n, m in lora_modules(again).items()} == {n: (m.r, m.scaling) for n, m in lora_modules(model).items()}
    assert torch.equal(again(x), model(x)) and not torch.allclose(model(x), Odd()(x), atol=1e-3)

def test_a_base_is_all_its_parameters_whatever_their_names(tmp_path):
    model = add_lora_to_model(Odd(), r=2, targets="up"); save_adapter(model, tmp_path)
    for name in ("A", "odd.base.weight", "first.up.bias"):
        other = Odd(); other.get_parameter(name).data.mul_(1.5)
        with pytest.raises(BadFileError, match="another base"): load_adapter(other, tmp_path)

WRAPPERS = {"compile": torch.compile, "parallel": nn.DataParallel, "both": lambda m: nn.DataParallel(torch.compile(m)), "sequential": nn.Sequential}

@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_saves_loads_swaps_and_merges_as_the_model(tmp_path, wrap):
    model, other = trained(), trained(r=2); save_adapter(other, tmp_path/"other")
    save_adapter(wrap(model), tmp_path/"a")
    assert torch.equal(logits(load_adapter(small(), tmp_path/"a")), logits(model))
    plain = small(); load_adapter(wrap(plain), tmp_path/"a"); assert torch.equal(logits(plain), logits(model))
    assert adapter_config(wrap(model)) == adapter_config(model) and adapter_tensors(wrap(model)).keys() == adapter_tensors(model).keys()
    with disable_lora(wrap(model)): assert torch.equal(logits(model), logits(small()))
    expected = logits(model); merge_lora(wrap(model)); assert not lora_modules(model)
    unmerge_lora(wrap(model)); assert torch.equal(logits(model), expected)
    swap_adapter(wrap(model), tmp_path/"other"); assert torch.equal(logits(model), logits(other))

def test_a_part_that_is_wrapped_is_refused(tmp_path):
    model = trained(); model.blocks[0] = nn.DataParallel(model.blocks[0])
    with pytest.raises(ValueError, match=r"blocks\.0.* wrap"): save_adapter(model, tmp_path/"a")
    assert not (tmp_path/"a").exists()

def test_what_is_trained_besides_is_refused(tmp_path):
    model = trained(); model.norm_f.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm_f\.weight.* A and B only"): save_adapter(model, tmp_path/"a")
    model.norm_f.weight.requires_grad_(False); save_adapter(model, tmp_path/"b") # nothing has changed yet
    model.norm_f.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match=r"changed since .*norm_f\.weight"): save_adapter(model, tmp_path/"a")
    assert not (tmp_path/"a").exists()
    state = merged_state_dict(model); assert torch.equal(state["norm_f.weight"], model.norm_f.weight)

def test_buffers_that_move_are_noticed(tmp_path):
    make = lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    torch.manual_seed(0); base = make(); model = add_lora_to_model(copy.deepcopy(base), r=2, targets="0")
    model.eval()(torch.randn(4, 8)); save_adapter(model, tmp_path/"a"); load_adapter(copy.deepcopy(base), tmp_path/"a")
    model.train()(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"changed since .*1\.running_mean"): save_adapter(model, tmp_path/"b")

@pytest.mark.parametrize("bare", [disable_lora, adapter_config, adapter_tensors, merge_lora, merged_state_dict, remove_lora, lambda l: save_adapter(l, "none"),
                                  lambda l: load_adapter(l, "none"), lambda l: swap_adapter(l, "none")])
def test_a_bare_layer(bare):
    layer = LoRALinear(nn.Linear(8, 8), r=2); names = list(layer.state_dict())
    with pytest.raises(ValueError, match="nothing holds it"): bare(layer).__enter__()
    assert list(layer.state_dict()) == names and "" not in layer._modules and not os.path.exists("none")

def test_a_message_names_the_remedy(tmp_path):
    save_adapter(trained(), tmp_path)
    state = load_file(tmp_path/WEIGHTS); save_file({k: v + 1 for k, v in state.items()}, tmp_path/WEIGHTS)
    with pytest.raises(BadFileError, match="delete tiny_llm.json"): load_adapter(small(), tmp_path)
    (tmp_path/NOTE).unlink(); load_adapter(small(), tmp_path)

# The same base in another type

CAST = {"float32": lambda m: m, "bfloat16": lambda m: m.bfloat16(), "float16": lambda m: m.half(), "there and back": lambda m: m.bfloat16().float()}

@pytest.mark.parametrize("first, then", [*(("float32", b) for b in CAST), ("bfloat16", "float32"), ("bfloat16", "there and back"), ("float16", "float32")])
def test_the_same_base_in_another_type(tmp_path, first, then):
    model = add_lora_to_model(CAST[first](small()))
    for layer in lora_modules(model).values(): nn.init.normal_(layer.B, std=0.1)
    save_adapter(model, tmp_path)
    again = load_adapter(CAST[then](small()), tmp_path)
    assert_close(logits(again).float(), logits(model).float(), atol=0.1, rtol=0.1)
    assert all(torch.equal(m.B.float(), lora_modules(model)[n].B.to(m.B.dtype).float()) for n, m in lora_modules(again).items())
    other = CAST[then](small()); other.norm_f.weight.data.mul_(1.5)
    with pytest.raises(BadFileError, match="another base"): load_adapter(other, tmp_path)

def test_cast_after_the_adapters_were_added(tmp_path):
    model = trained().bfloat16(); save_adapter(model, tmp_path/"a")
    for cast in (lambda m: m, lambda m: m.bfloat16()): assert len(lora_modules(load_adapter(cast(small()), tmp_path/"a"))) == 4
    model.norm_f.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="changed since"): save_adapter(model, tmp_path/"b")

def test_a_number_too_large_for_the_type_of_the_base(tmp_path):
    model = trained()
    with torch.no_grad(): lora_modules(model)["blocks.0.attn.qkv"].B[0, 0] = 1e6
    save_adapter(model, tmp_path)
    base = small().half(); before = picture(base)
    with pytest.raises(BadFileError, match="float16"): load_adapter(base, tmp_path)
    assert same(picture(base), before)

def test_mixed_precision_merges_and_comes_back(tmp_path):
    model = trained(small().bfloat16())
    for p in lora_parameters(model): p.data = p.data.float()
    expected, kept = logits(model), [p.clone() for p in lora_parameters(model)]
    assert {p.dtype for p in merge_lora(model).parameters()} == {torch.bfloat16}
    assert_close(logits(model), expected, **TOLERANCE[torch.bfloat16])
    assert torch.equal(logits(unmerge_lora(model)), expected) and all(p.dtype == torch.float32 and torch.equal(p, k) for p, k in zip(lora_parameters(model), kept))

# Merging tells the truth

def test_merging_a_layer_that_goes_its_own_way(tmp_path):
    def closure(m): f = m.forward; m.forward = lambda x: f(x)
    def hook(m): m.register_forward_hook(lambda m, x, y: y * 2)
    for change, late in ((closure, False), (hook, False), (closure, True), (hook, True), (lambda m: m.register_forward_pre_hook(lambda m, x: None), True)):
        model = small()
        if not late: change(model.blocks[0].attn.qkv)
        trained(model)
        if late: change(model.blocks[0].attn.qkv)
        before, x = picture(model), logits(model)
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv has a hook, or a forward of its own"): merge_lora(model)
        assert same(picture(model), before) and torch.equal(logits(model), x)

@pytest.mark.parametrize("change", [lambda m: m.load_state_dict({k: v + 0.5 for k, v in m.state_dict().items()}), lambda m: m.blocks[0].attn.qkv.weight.data[0].add_(1),
    lambda m: m.bfloat16().blocks[1].attn.W_o.weight.data.mul_(2), lambda m: m.load_state_dict(small(3).state_dict(), assign=True)], ids=["load", "data", "cast", "assign"])
def test_a_change_after_the_merge_is_not_lost(change):
    model = merge_lora(trained()); change(model); before = picture(model)
    with pytest.raises(ValueError, match="keep=False"): unmerge_lora(model)
    assert same(picture(model), before)
    assert same(picture(merge_lora(model, keep=False)), before) and "_before_merge" not in vars(model)

# Threads and processes

def both(tmp_path, **how):
    "Two models, their folders, and what they and the base say."
    a, b = trained(), trained(small(), **how)
    with torch.no_grad(): [m.B.add_(0.1) for m in lora_modules(b).values()]
    for m, name in ((a, "a"), (b, "b")): save_adapter(m, tmp_path/name)
    return a, {"a": logits(a), "b": logits(b), "base": logits(small())}

@pytest.mark.parametrize("how", [{}, dict(r=4), dict(targets="all-linear")], ids=["same kind", "other rank", "other layers"])
def test_a_thread_sees_whole_adapters(tmp_path, how):
    model, said = both(tmp_path, **how); stop, seen, layers = [], [], dict(model.named_modules())
    def changes():
        try:
            for i in range(30):
                swap_adapter(model, tmp_path/"ba"[i % 2]); save_adapter(model, tmp_path/"c"); adapter_config(model); fingerprint(model)
                load_adapter(model, tmp_path/"ba"[i % 2])
                if not how: load_adapter(model, tmp_path/"ab"[i % 2])
                assert torch.equal(logits(load_adapter(small(), tmp_path/"c")), said["ba"[i % 2]])
        finally: stop.append(1)
    thread = threading.Thread(target=changes); thread.start()
    while not stop: seen.append(logits(model))
    thread.join()
    kinds = {next((k for k, v in said.items() if torch.equal(y, v)), "a mixture") for y in seen}
    assert seen and kinds <= {"a", "b"}

def test_reading_leaves_every_layer_in_its_place(tmp_path, monkeypatch):
    model = trained(); save_adapter(model, tmp_path/"a"); before = picture(model)
    def forbidden(*args): raise AssertionError("a layer was replaced")
    monkeypatch.setattr("tiny_llm.lora._replace", forbidden); monkeypatch.setattr("tiny_llm.adapter._replace", forbidden)
    adapter_config(model), adapter_tensors(model), save_adapter(model, tmp_path/"b"), merged_state_dict(model), fingerprint(model)
    assert same(picture(model), before)

def test_switched_off_nothing_else_is_changed(tmp_path):
    model = trained(); save_adapter(model, tmp_path); expected = logits(model)
    with disable_lora(model):
        for f in (add_lora_to_model, adapter_config, merge_lora, lambda m: load_adapter(m, tmp_path), lambda m: swap_adapter(m, tmp_path)):
            with pytest.raises(ValueError, match="switched off"): f(model)
        assert remove_lora(model) is model
    assert torch.equal(logits(model), expected)

def saves(folder, seed, n):
    model = trained()
    with torch.no_grad(): [m.B.fill_(seed) for m in lora_modules(model).values()]
    for _ in range(n): save_adapter(model, folder)

def test_two_processes_save_into_one_folder(tmp_path):
    saves(tmp_path, 1.0, 1)
    others = [multiprocessing.get_context("forkserver").Process(target=saves, args=(tmp_path, float(s), 15)) for s in (1, 2)]
    for p in others: p.start()
    while any(p.is_alive() for p in others):
        _, tensors, _ = read_adapter(tmp_path)
        assert len({t[0, 0].item() for k, t in tensors.items() if k.endswith(".B")}) == 1
    assert [p.exitcode for p in others] == [0, 0] and sorted(os.listdir(tmp_path)) == list(FILES)
