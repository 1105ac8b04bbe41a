"Gradient checkpointing computes the activations a second time and must not change one gradient."
import pytest, torch
from torch.utils.checkpoint import checkpoint
from tiny_llm.lora import lora_modules, lora_parameters
from .peers import HF, cases, loss, ours, pair, peft_layers

def backward(model):
    torch.manual_seed(0) # GPT-2 has dropout of its own
    loss(model.train()).backward()

def grads(model):
    backward(model)
    found = [p.grad for p in lora_parameters(model)]
    model.zero_grad()
    assert found and all(g is not None and g.abs().max() > 0 for g in found)
    return found

def checkpointed(model, **how):
    model.enable_input_require_grads() # without it the re-entrant kind sees no input that needs a gradient
    model.gradient_checkpointing_enable(how)
    return model

@pytest.mark.parametrize("use_reentrant", [True, False])
@cases(HF, ["two", "rslora patterns"])
def test_hugging_face(name, how, use_reentrant):
    mine, other = pair(name, **how)
    plain = grads(mine)
    calls, layer = [], list(lora_modules(mine).values())[0]
    layer.register_forward_hook(lambda *a: calls.append(1))
    again = grads(checkpointed(mine, use_reentrant=use_reentrant))
    assert len(calls) == 2 and all(map(torch.equal, plain, again)) # computed twice
    backward(checkpointed(other, use_reentrant=use_reentrant))
    in_peft = [w.default.weight.grad for m in peft_layers(other).values() for w in (m.lora_A, m.lora_B)]
    assert all(map(torch.equal, again, in_peft)) and len(again) == len(in_peft)

@pytest.mark.parametrize("use_reentrant", [True, False])
@cases(["gpt", "gpt-untied"], ["two", "rslora patterns"])
def test_our_blocks(name, how, use_reentrant):
    mine = ours(name, **how); plain = grads(mine)
    mine.tok_emb.register_forward_hook(lambda module, args, out: out.requires_grad_())
    for block in mine.blocks: block.forward = lambda *args, f=block.forward: checkpoint(f, *args, use_reentrant=use_reentrant)
    assert all(map(torch.equal, plain, grads(mine)))
