"The same logits as PEFT, bit for bit: same base, same A, same B."
import torch
from .peers import cases, far, logits, pair, plain

@cases()
def test_logits(name, how):
    mine, other = pair(name, **how)
    assert torch.equal(logits(mine), logits(other)) and far(logits(mine), plain(name))
