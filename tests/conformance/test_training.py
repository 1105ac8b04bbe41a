"Three steps of AdamW from the same start, with dropout: the same losses, A and B as PEFT, bit for bit, and the base as it was."
import torch
from tiny_llm.lora import lora_modules, lora_parameters
from .peers import SOME, base, cases, pair, peft_layers, train

@cases(configs=SOME)
def test_three_steps(name, how):
    mine, other = pair(name, **how); start = [p.detach().clone() for p in lora_parameters(mine)]
    layers, said = peft_layers(other), []
    for model in (mine, other):
        torch.manual_seed(0)
        said.append(train(model.train(), [p for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*said) and said[0][-1] != said[0][0]
    for n, m in lora_modules(mine).items():
        assert torch.equal(m.A, layers[n].lora_A.default.weight) and torch.equal(m.B, layers[n].lora_B.default.weight)
        assert torch.equal(m.base.weight, base(name).get_submodule(n).weight)
    assert not any(map(torch.equal, start, lora_parameters(mine)))
