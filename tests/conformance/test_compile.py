"torch.compile: the same logits as without, and as PEFT."
import shutil
import torch
from torch.testing import assert_close
from .peers import TIGHT, X, cases, logits, pair, peft_layers

def compiled(model, x=None, backend="aot_eager"):
    torch._dynamo.reset()
    try: return logits(torch.compile(model, backend=backend), x)
    finally: torch._dynamo.reset()

@cases(["gpt", "mlp"], ["two"])
def test_captured(name, how):
    "The whole model is captured and run as it was."
    mine, other = pair(name, **how)
    assert_close(compiled(mine), logits(other), **TIGHT)

@cases(["mlp"], ["rslora"])
def test_compiled(name, how):
    "One layer goes through the whole compiler, where there is one for C++."
    mine, other = pair(name, **how); first = next(iter(peft_layers(other)))
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    assert_close(compiled(mine.get_submodule(first), X, backend), logits(peft_layers(other)[first], X), **TIGHT)
