"Where PEFT is known to go wrong, or only warns: what it does is observed and recorded beside what happens here."
import copy, re, warnings
from pathlib import Path
import peft, pytest, torch, torch.nn as nn
from safetensors.torch import load_file, save_file
from tiny_llm.adapter import disable_lora, load_adapter, merge_lora, save_adapter, unmerge_lora
from tiny_llm.lora import add_lora_to_model, lora_modules
from .peers import NOTE, WEIGHTS, base, edit, logits, ours, pair, peft_layers, share

HOW = dict(r=4, alpha=8, targets=["q_proj", "v_proj"])

def watched(f, *args, **kw):
    "(what f returns, how many warnings it gave); the ones that a library gives of its own future do not count."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = f(*args, **kw)
    return out, sum(not issubclass(w.category, (FutureWarning, DeprecationWarning)) for w in seen)

def refusal(f, *args, **kw):
    "The first clause of the error, without the folder."
    with pytest.raises((ValueError, TypeError)) as e: f(*args, **kw)
    text = str(e.value)
    for path in (a for a in args if isinstance(a, Path)): text = text.replace(str(path), "the adapter")
    return "refused: " + re.split(r"; |\. |: fingerprint |, unexpected", re.sub(r"^the adapter( is not a usable adapter)?: ", "", text))[0]

def warned(n): return {0: "no warning", 1: "a warning"}.get(n, f"{n} warnings")

def moved(a, b): return f"logits move by {(a - b).abs().max():.2g}"

def fraction(mask): return f"{mask.float().mean():.0%}"

def lora(model, **how):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **how)).eval()

def test_tied_head(record):
    other, n = watched(lora, base("llama"), target_modules=["lm_head"]); before = logits(other)
    merged, m = watched(other.merge_and_unload)
    assert (logits(merged) - before).abs().max() > 0.1
    record("pitfall", "LoRA on a tied head, merged", peft=f"{moved(logits(merged), before)}; {warned(n)} on wrapping, {warned(m)} on merging",
           ours=refusal(add_lora_to_model, base("llama"), targets="lm_head"))

def test_all_linear_outside_of_transformers(record):
    other, n = watched(lora, base("gpt"), target_modules="all-linear"); before = logits(other)
    merged, m = watched(other.merge_and_unload)
    mine = ours("gpt", targets="all-linear")
    assert "lm_head" in other.targeted_module_names and "lm_head" not in lora_modules(mine)
    torch.testing.assert_close(logits(merge_lora(copy.deepcopy(mine))), logits(mine), atol=1e-5, rtol=1e-5)
    record("pitfall", "all-linear on a model outside of transformers, merged", peft=f"wraps the tied head too; {moved(logits(merged), before)}; {warned(n + m)}", ours="leaves the head out")

def test_a_missing_target(record):
    targets = ["q_proj", "v_porj"]
    other, n = watched(lora, base("llama"), target_modules=targets)
    record("pitfall", "one of two targets does not exist", peft=f"wraps {len(peft_layers(other))} of 4 layers, {warned(n)}", ours=refusal(add_lora_to_model, base("llama"), targets=targets))

def test_a_rank_above_the_layer(record):
    config = peft.LoraConfig(r=64, target_modules=["q_proj"])
    other, n = watched(peft.get_peft_model, base("llama"), config)
    layer = next(iter(peft_layers(other).values())); A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
    record("pitfall", "a rank larger than the layer", peft=f"r=64 trains {A.numel() + B.numel():,} numbers for a weight of {layer.base_layer.weight.numel():,}, {warned(n)}",
           ours=f"does the same, {warned(watched(add_lora_to_model, base('llama'), r=64, targets='q_proj')[1])}")

def test_wrapping_twice(record):
    mine, other = pair("llama", **HOW); before = logits(other)
    twice, n = watched(peft.get_peft_model, other, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    gone = sum(m.lora_B.default.weight.abs().max() == 0 for m in peft_layers(twice.base_model.model).values())
    record("pitfall", "wrapping a model twice", peft=f"{warned(n)}; {gone} of {len(lora_modules(mine))} trained B are reset to 0, {moved(logits(twice.eval()), before)}",
           ours=refusal(add_lora_to_model, mine, **HOW))

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merge_and_unmerge(dtype, record):
    mine = ours("llama", **HOW).to(dtype)
    other = share(mine, peft.get_peft_model(base("llama").to(dtype), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])))
    name, weights = next(iter(lora_modules(mine))), {n: m.base.weight.clone() for n, m in lora_modules(mine).items()}
    _, n = watched(lambda: (other.merge_adapter(), other.unmerge_adapter())); unmerge_lora(merge_lora(mine))
    changed = torch.cat([(peft_layers(other)[n].base_layer.weight != w).flatten() for n, w in weights.items()])
    exact = all(torch.equal(m.base.weight, weights[n]) for n, m in lora_modules(mine).items())
    assert exact and changed.any()
    record("pitfall", f"merge, then unmerge in {str(dtype).removeprefix('torch.')}", peft=f"about {round(changed.float().mean().item(), 1):.0%} of the base's weights have changed, {warned(n)}", ours="every bit as before")

def test_switched_off_while_merged(record):
    mine, other = pair("llama", **HOW)
    merge_lora(mine); other.merge_adapter()
    assert all(m.merged for m in peft_layers(other).values())
    def off():
        with other.disable_adapter(): logits(other)
    def ours_off():
        with disable_lora(mine): pass
    _, n = watched(off)
    record("pitfall", "switched off while merged", peft=f"afterwards {sum(m.merged for m in peft_layers(other).values())} of 4 layers are still merged, {warned(n)}", ours=refusal(ours_off))

def test_numbers_that_are_none_are_merged(record):
    mine, other = pair("llama", **HOW); layer = list(lora_modules(mine))[-1]
    with torch.no_grad(): lora_modules(mine)[layer].B[0] = peft_layers(other)[layer].lora_B.default.weight[0] = float("nan")
    merged, n = watched(other.merge_and_unload)
    record("pitfall", "an adapter with NaN, merged", peft=f"merged: {fraction(logits(merged).isnan())} of the logits are NaN, {warned(n)} (safe_merge=True refuses)", ours=refusal(merge_lora, mine))

# Files

@pytest.fixture
def saved(tmp_path):
    "(folder, logits of the adapter in it)."
    mine = ours("llama", **HOW); save_adapter(mine, tmp_path)
    return tmp_path, logits(mine)

def compare(record, what, folder, expected, model=None):
    "Load a folder in both."
    model = model or base("llama")
    other, n = watched(peft.PeftModel.from_pretrained, copy.deepcopy(model), folder)
    got = logits(other.eval())
    how = f"{fraction(got.isnan())} of the logits are NaN" if got.isnan().any() else moved(got, expected)
    record("pitfall", what, peft=f"loads: {how}, {warned(n)}", ours=refusal(load_adapter, model, folder))

def tensors_of(folder, change):
    save_file(change(load_file(folder/WEIGHTS)), folder/WEIGHTS, metadata={"format": "pt"})
    (folder/NOTE).unlink() # the checksum in it would say it too

def test_missing_tensors(saved, record):
    folder, expected = saved
    tensors_of(folder, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj" not in k})
    compare(record, "a layer is missing in the file", folder, expected)

def test_nan_in_the_file(saved, record):
    folder, expected = saved
    tensors_of(folder, lambda t: {k: v * float("nan") if "layers.1.self_attn.v_proj.lora_B" in k else v for k, v in t.items()})
    compare(record, "NaN in the file", folder, expected)

def test_another_alpha(saved, record):
    folder, expected = saved; note = (folder/NOTE).read_bytes()
    edit(folder, lora_alpha=32); (folder/NOTE).write_bytes(note)
    compare(record, "alpha was edited in the configuration", folder, expected)

def test_a_flipped_bit(saved, record):
    folder, expected = saved; data = bytearray((folder/WEIGHTS).read_bytes())
    data[-1] ^= 0x80 # the sign of the last number
    (folder/WEIGHTS).write_bytes(data)
    compare(record, "one bit of the file flipped", folder, expected)

def test_another_base(saved, record):
    folder, expected = saved
    model = base("llama")
    with torch.no_grad(): model.model.layers[0].self_attn.q_proj.weight.neg_()
    compare(record, "an adapter of another base", folder, expected, model)

# Settings

def test_alpha_0(record):
    other, n = watched(peft.get_peft_model, base("llama"), peft.LoraConfig(r=4, lora_alpha=0, target_modules=["q_proj"], init_lora_weights=False))
    assert torch.equal(logits(other.eval()), logits(base("llama")))
    record("pitfall", "alpha = 0", peft=f"an adapter that can never do anything, {warned(n)}", ours=refusal(add_lora_to_model, base("llama"), alpha=0, targets="q_proj"))

def test_a_rank_pattern_that_fits_nothing(record):
    other, n = watched(lora, base("llama"), target_modules=["q_proj"], rank_pattern={"k_proj": 2})
    ranks = {m.r["default"] for m in peft_layers(other).values()}
    record("pitfall", "a rank_pattern that fits no layer", peft=f"{warned(n)}, rank {ranks.pop()} everywhere", ours=refusal(add_lora_to_model, base("llama"), targets="q_proj", rank_pattern={"k_proj": 2}))

def test_a_layer_that_is_never_called(record):
    "In eval mode PyTorch hands the weight of this layer to one fused function."
    torch.manual_seed(0)
    encoder, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 5, 16)
    other, n = watched(lora, copy.deepcopy(encoder), target_modules=["linear1"])
    with torch.no_grad(): by = [(other.train(mode)(x) - encoder.train(mode)(x)).abs().max().item() for mode in (True, False)]
    record("pitfall", "a layer inside nn.TransformerEncoderLayer", peft=f"the adapter moves the output by {by[0]:.2g} in training and by {by[1]:.2g} in eval mode, {warned(n)}",
           ours=refusal(add_lora_to_model, encoder, targets="linear1"))
