"The same gradients of A and B as PEFT, bit for bit, in training mode with the same dropout; the base gets none."
import torch
from tiny_llm.lora import lora_modules
from .peers import cases, loss, pair, peft_layers

@cases()
def test_gradients(name, how):
    mine, other = pair(name, **how)
    for model in (mine, other):
        torch.manual_seed(0)
        loss(model.train()).backward()
    layers = peft_layers(other)
    for n, m in lora_modules(mine).items():
        assert torch.equal(m.A.grad, layers[n].lora_A.default.weight.grad) and torch.equal(m.B.grad, layers[n].lora_B.default.weight.grad)
        assert m.A.grad.abs().max() > 0 and m.B.grad.abs().max() > 0
    trained = {n for n, p in mine.named_parameters() if p.grad is not None}
    assert trained == {f"{n}.{ab}" for n in layers for ab in "AB"} == {n for n, p in mine.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in mine.parameters() if p.requires_grad) == other.get_nb_trainable_parameters()[0]
