"Without its adapter a model is its base, bit for bit, and with it again what it was; as in PEFT."
import pytest, torch
from tiny_llm.adapter import disable_lora
from tiny_llm.lora import lora_parameters, remove_lora
from .peers import HF, IDS, SOME, base, cases, far, logits, pair, plain, same_state, state, train

@cases(configs=SOME)
def test_off_and_on(name, how):
    mine, other = pair(name, **how); with_lora, before = logits(mine), state(mine)
    assert far(with_lora, plain(name))
    with disable_lora(mine), other.disable_adapter():
        assert torch.equal(logits(mine), plain(name)) and torch.equal(logits(other), plain(name))
        with disable_lora(mine): assert torch.equal(logits(mine), plain(name))
    assert torch.equal(logits(mine), with_lora) and torch.equal(logits(other), with_lora) and same_state(mine.state_dict(), before)
    with pytest.raises(KeyError), disable_lora(mine): raise KeyError
    assert torch.equal(logits(mine), with_lora)

@cases(configs=["two", "rslora"])
def test_removed_is_unloaded(name, how):
    mine, other = pair(name, **how)
    assert far(logits(mine), plain(name))
    for model in (remove_lora(mine), other.unload()):
        assert same_state(model.state_dict(), base(name).state_dict()) and torch.equal(logits(model), plain(name))

@cases(configs=["two"])
def test_after_training_the_base_is_still_there(name, how):
    mine, other = pair(name, **how); with_lora = logits(mine)
    train(mine, lora_parameters(mine)); assert far(logits(mine), with_lora)
    with disable_lora(mine): assert torch.equal(logits(mine), plain(name))

@cases(HF, ["two"])
def test_while_generating(name, how):
    mine, other = pair(name, **how)
    def scores(model): return torch.stack(model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_scores=True).scores)
    with_lora = scores(mine)
    with disable_lora(mine), other.disable_adapter():
        off = scores(mine)
        assert torch.equal(off, scores(other)) and torch.equal(off, scores(base(name).requires_grad_(False)))
    assert torch.equal(with_lora, scores(other)) and torch.equal(with_lora, scores(mine)) and not torch.equal(with_lora, off)
