"Merged = unmerged = unloaded, here and in PEFT. A second merge is refused, and so is an adapter with NaN or infinity; the base is then untouched."
import copy
import pytest, torch
from torch.testing import assert_close
from tiny_llm.adapter import merge_lora, merged_state_dict, unmerge_lora
from tiny_llm.lora import lora_modules
from .peers import HF, TIGHT, base, cases, far, logits, ours, pair, peft_layers, plain, same_state, state

@cases()
def test_merged_is_unmerged_is_unloaded(name, how):
    mine, other = pair(name, **how)
    with_lora, before, promised = logits(mine), state(mine), merged_state_dict(mine)
    assert far(with_lora, plain(name)) and torch.equal(with_lora, logits(other))
    safe = copy.deepcopy(other).merge_and_unload(safe_merge=True)
    other.merge_adapter(); merged_peft = logits(other); other.unmerge_adapter()
    other = other.merge_and_unload()
    merge_lora(mine)
    assert list(mine.state_dict()) == list(base(name).state_dict()) and not lora_modules(mine) and all(p.is_contiguous() for p in mine.parameters())
    for same in (other, safe): assert same_state(mine.state_dict(), same.state_dict()) and torch.equal(logits(mine), logits(same))
    assert same_state(promised, mine.state_dict()) and torch.equal(logits(mine), merged_peft)
    assert_close(logits(mine), with_lora, **TIGHT)
    assert same_state(unmerge_lora(mine).state_dict(), before) and torch.equal(logits(mine), with_lora)

@cases(configs=["two"])
def test_a_second_merge_changes_nothing(name, how):
    mine, other = pair(name, **how)
    once = state(merge_lora(mine)); other.merge_adapter(); peft_once = logits(other)
    with pytest.raises(ValueError, match="merged"): merge_lora(mine)
    with pytest.warns(UserWarning, match="already merged"): other.merge_adapter()
    assert same_state(mine.state_dict(), once) and torch.equal(logits(mine), peft_once) and torch.equal(logits(other), peft_once)

@pytest.mark.parametrize("ab", "AB")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@cases(["gpt", "llama", "gpt2", "mlp"], ["two"])
def test_broken_numbers_are_refused(name, how, ab, value):
    mine, other = pair(name, **how); layer = list(lora_modules(mine))[-1]
    with torch.no_grad():
        getattr(lora_modules(mine)[layer], ab)[0] = value
        getattr(peft_layers(other)[layer], f"lora_{ab}").default.weight[0] = value
    before = state(mine)
    for f in (merge_lora, merged_state_dict):
        with pytest.raises(ValueError, match="NaN"): f(mine)
    with pytest.raises(ValueError, match="NaN"): other.merge_and_unload(safe_merge=True)
    assert mine.state_dict().keys() == before.keys() and all(v.equal(before[k]) or not v.isfinite().all() for k, v in mine.state_dict().items())
    plain = base(name).state_dict()
    assert all(torch.equal(v, plain[k.replace(".base.", ".")]) for k, v in mine.state_dict().items() if k.rsplit(".", 1)[-1] not in "AB")

@cases(HF, ["two"])
def test_a_merged_model_is_a_plain_one_on_disk(name, how, tmp_path):
    mine = merge_lora(ours(name, **how))
    mine.save_pretrained(tmp_path)
    again = type(mine).from_pretrained(tmp_path).eval()
    assert same_state(again.state_dict(), mine.state_dict()) and torch.equal(logits(again), logits(mine))
