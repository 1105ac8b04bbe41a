"One layer of any shape, rank, alpha, type, with or without bias, Linear or Conv1D: output, update and merged weight are those of PEFT's layer."
import peft, torch, torch.nn as nn
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D
from tiny_llm.adapter import merged_linear
from tiny_llm.lora import TOLERANCE, LoRALinear
from .peers import REPEATABLE

@st.composite
def layers(draw):
    "(our layer, PEFT's layer with the same numbers, an input)."
    d_in, d_out, dtype, conv = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.sampled_from(TYPES)), draw(st.booleans())
    r, alpha, rslora = draw(st.integers(1, min(d_in, d_out))), draw(st.one_of(st.integers(1, 64), st.floats(0.1, 64))), draw(st.booleans())
    batch = draw(st.lists(st.integers(1, 4), max_size=3))
    torch.manual_seed(draw(st.integers(0, 999)))
    base = Conv1D(d_out, d_in) if conv else nn.Linear(d_in, d_out, bias=draw(st.booleans()))
    if conv: nn.init.normal_(base.bias)
    mine = LoRALinear(base.to(dtype), r, alpha, use_rslora=rslora).eval()
    with torch.no_grad(): mine.A.normal_(std=0.3), mine.B.normal_(std=0.3)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, fan_in_fan_out=conv)
    other = peft.tuners.lora.Linear(base, "default", config, r=r, lora_alpha=alpha, is_target_conv_1d_layer=conv).to(dtype).eval()
    with torch.no_grad(): other.lora_A.default.weight.copy_(mine.A), other.lora_B.default.weight.copy_(mine.B)
    return mine, other, torch.randn(*batch, d_in).to(dtype)

TYPES = [torch.float32, torch.float64, torch.bfloat16]

@settings(REPEATABLE, max_examples=100)
@given(layers())
@torch.no_grad()
def test_output(case):
    mine, other, x = case
    assert torch.equal(mine(x), other(x)) and mine(x).dtype == x.dtype

def close(a, b):
    "Equal bit for bit; in bfloat16 PEFT computes B A in fp32 and rounds once, where here it is computed as the layer computes, so last bits differ."
    if a.dtype is not torch.bfloat16: return torch.equal(a, b)
    return (a - b).abs().max() <= TOLERANCE[a.dtype]["atol"] * b.abs().max().clamp(min=1)

@settings(REPEATABLE, max_examples=100)
@given(layers())
@torch.no_grad()
def test_update_and_merge(case):
    mine, other, x = case
    delta, unmerged = mine.delta_weight(), mine(x)
    assert close(delta.T if other.fan_in_fan_out else delta, other.get_delta_weight("default"))
    merged = merged_linear(mine); other.merge()
    assert close(merged.weight, other.base_layer.weight) and close(merged(x), other(x))
    tolerance = TOLERANCE[x.dtype]
    assert_close(merged(x), unmerged, atol=tolerance["atol"] * max(1, unmerged.abs().max().item()), rtol=tolerance["rtol"])
