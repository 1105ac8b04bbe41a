"The layer of chapter 1."
import copy, io
import pytest, torch, torch.nn as nn
from torch.testing import assert_close
from tiny_llm.lora import TOLERANCE, LoRALinear

DTYPES = list(TOLERANCE)

def random_layer(dtype=torch.float32, bias=True, r=3, alpha=6, shape=(20, 12), **how):
    "A layer whose B is not zero: with B = 0 a wrong product would pass."
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(shape[1], shape[0], bias=bias).to(dtype), r=r, alpha=alpha, **how)
    with torch.no_grad(): layer.A.normal_(), layer.B.normal_()
    return layer

def naive(layer, x):
    "The same answer in float64, one sum at a time, without any of the layer's own code."
    W, A, B, bias = (t if t is None else t.detach().double() for t in (layer.base.weight, layer.A, layer.B, layer.base.bias))
    delta = layer.alpha / layer.r * torch.stack([torch.outer(B[:, i], A[i]) for i in range(layer.r)]).sum(0)  # (out, in)
    h = torch.einsum("...i,oi->...o", x.double(), W + delta)
    return delta, h if bias is None else h + bias

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape, r", [((20, 12), 1), ((20, 12), 3), ((12, 20), 12), ((16, 16), 16), ((1, 12), 3), ((4, 3), 9)])
def test_layer_is_the_naive_product(dtype, bias, shape, r):
    layer, x = random_layer(dtype, bias, r, shape=shape), torch.randn(2, 3, shape[1]).to(dtype)
    delta, h = naive(layer, x)
    assert layer(x).dtype == layer.delta_weight().dtype == dtype and layer.scaling == 6 / r
    assert_close(layer.delta_weight().double(), delta, **TOLERANCE[dtype])
    assert_close(layer(x).double(), h, **TOLERANCE[dtype])
    assert not torch.allclose(layer.base(x).double(), h, **TOLERANCE[dtype])

@pytest.mark.parametrize("lead", [(), (5,), (0,), (2, 3, 4)])
def test_any_leading_shape(lead):
    layer, x = random_layer(), torch.randn(*lead, 12)
    assert layer(x).shape == (*lead, 20)
    assert_close(layer(x).double(), naive(layer, x)[1], **TOLERANCE[torch.float32])

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_new_layer_changes_nothing(dtype, bias):
    base, x = nn.Linear(12, 20, bias=bias).to(dtype), torch.randn(2, 3, 12).to(dtype)
    weight, before = base.weight, base(x)
    layer = LoRALinear(base, r=3, dropout=0.5)
    assert layer.base is base and base.weight is weight and torch.equal(layer(x), before) and torch.equal(layer.eval()(x), before)
    assert layer.A.shape == (3, 12) and layer.B.shape == (20, 3) and layer.A.dtype == layer.B.dtype == dtype
    assert not layer.B.count_nonzero() and not layer.delta_weight().count_nonzero()

def test_defaults_and_start_of_A():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(512, 512))
    assert (layer.r, layer.alpha, layer.scaling, layer.dropout.p) == (8, 16, 2, 0)
    assert abs(layer.A.std().item() - 0.02) < 0.001 and abs(layer.A.mean().item()) < 0.001

def test_only_A_and_B_are_trained():
    layer = random_layer()
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == {"A": True, "B": True, "base.weight": False, "base.bias": False}
    layer(torch.randn(4, 12)).square().sum().backward()
    assert layer.base.weight.grad is None and layer.base.bias.grad is None

@pytest.mark.parametrize("B_zero", [True, False])
def test_gradients_by_hand(B_zero):
    layer, x, target = random_layer(torch.float64), torch.randn(7, 12).double().requires_grad_(), torch.randn(7, 20).double()
    if B_zero: nn.init.zeros_(layer.B)
    (layer(x) - target).square().sum().backward()
    G, s = 2 * (layer(x) - target).detach(), 2.0                                 # (batch, out)
    A, B, W = layer.A.detach(), layer.B.detach(), layer.base.weight
    tol = TOLERANCE[torch.float64]
    assert_close(layer.A.grad, s * B.T @ G.T @ x.detach(), **tol)                # (r, out) x (out, batch) x (batch, in)
    assert_close(layer.B.grad, s * G.T @ (x.detach() @ A.T), **tol)              # (out, batch) x (batch, r)
    assert_close(x.grad, G @ (W + s * B @ A), **tol)                             # (batch, out) x (out, in)
    assert bool(layer.A.grad.count_nonzero()) != B_zero and layer.B.grad.count_nonzero() == layer.B.numel()

@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_both_zero_never_move_and_one_zero_does(optimizer):
    for zero, moves in (("AB", False), ("A", True), ("B", True)):
        layer, x = random_layer(), torch.randn(7, 12)
        with torch.no_grad(): [getattr(layer, n).zero_() for n in zero]
        opt = optimizer([layer.A, layer.B], lr=0.01)
        for _ in range(5): opt.zero_grad(); (layer(x) - 1).square().mean().backward(); opt.step()
        assert bool(layer.A.count_nonzero()) == bool(layer.B.count_nonzero()) == moves

def test_training_leaves_the_base_alone_and_reaches_a_target():
    layer, x = random_layer(r=2), torch.randn(64, 12)
    nn.init.zeros_(layer.B)
    W, goal = layer.base.weight.clone(), layer(x).detach() + x @ torch.outer(torch.randn(20), torch.randn(12)).T
    opt = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.03)
    for _ in range(400): opt.zero_grad(); loss = (layer(x) - goal).square().mean(); loss.backward(); opt.step()
    assert loss < 1e-3 and torch.equal(layer.base.weight, W)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer, x = random_layer(shape=(64, 128), r=8, alpha=1), torch.randn(32, 128)
    with torch.no_grad(): layer.A.mul_(0.1)
    with torch.autocast("cpu", dtype): low = layer(x); low.float().square().sum().backward()
    assert low.dtype == dtype and not torch.equal(low.float(), layer(x))
    assert_close(low.float(), layer(x), **TOLERANCE[dtype])
    assert layer.A.grad.dtype == layer.A.dtype == layer.B.grad.dtype == torch.float32 and layer.A.grad.count_nonzero()

def test_new_layer_changes_nothing_under_autocast():
    base, x = nn.Linear(64, 64), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(LoRALinear(base)(x), base(x))

def test_device_of_the_base():
    with torch.device("meta"): base = nn.Linear(4096, 4096)
    layer = LoRALinear(base)
    assert layer.A.is_meta and layer.B.is_meta and layer(torch.empty(2, 4096, device="meta")).shape == (2, 4096)

@pytest.mark.parametrize("how, says", [
    (dict(r=0), "less than 1"), (dict(r=-1), "less than 1"), (dict(r=2.5), "whole"), (dict(r=8.0), "whole"), (dict(r=True), "whole"),
    (dict(r="8"), "whole"), (dict(r=None), "whole"), (dict(alpha=0), "alpha"), (dict(alpha=-16), "alpha"), (dict(alpha=float("nan")), "alpha"),
    (dict(alpha=float("inf")), "alpha"), (dict(dropout=-0.1), "dropout"), (dict(dropout=1.0), "dropout"), (dict(dropout=1.5), "dropout"),
    (dict(dropout=float("nan")), "dropout")])
def test_bad_numbers_are_named_and_freeze_nothing(how, says):
    base = nn.Linear(12, 20)
    with pytest.raises(ValueError, match=says): LoRALinear(base, **how)
    assert base.weight.requires_grad and base.bias.requires_grad

@pytest.mark.parametrize("make, says", [
    (lambda: nn.ReLU(), "ReLU"), (lambda: nn.Embedding(12, 20), "Embedding"), (lambda: nn.Conv1d(12, 20, 1), "Conv1d"),
    (lambda: None, "NoneType"), (lambda: torch.randn(20, 12), "Tensor"), (random_layer, "already")])
def test_only_a_linear_layer_can_be_wrapped(make, says):
    with pytest.raises(TypeError, match=says): LoRALinear(make())

def test_state_dict():
    layer, other, x = random_layer(), LoRALinear(nn.Linear(12, 20), r=3, alpha=6), torch.randn(4, 12)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "A": (3, 12), "B": (20, 3), "base.weight": (20, 12), "base.bias": (20,)}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch"): LoRALinear(nn.Linear(12, 20), r=4).load_state_dict(layer.state_dict())

def test_deepcopy_and_pickle():
    layer, x = random_layer(dropout=0.1).eval(), torch.randn(4, 12)
    kept = io.BytesIO(); torch.save(layer, kept); kept.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(kept, weights_only=False)):
        assert torch.equal(twin(x), layer(x)) and (twin.r, twin.alpha, twin.scaling, twin.dropout.p) == (3, 6, 2, 0.1)
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
        with torch.no_grad(): twin.B.add_(1)
        assert not torch.equal(twin(x), layer(x))

def test_repr_says_rank_and_alpha(): assert "r=3, alpha=6, scaling=2" in repr(random_layer())

def test_dropout_only_while_training_and_only_on_the_detour():
    layer, x = random_layer(shape=(64, 64), dropout=0.5), torch.randn(8, 64)
    assert not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    assert_close(layer(x).double(), naive(layer, x)[1], **TOLERANCE[torch.float32])
    nn.init.zeros_(layer.B)
    assert torch.equal(layer.train()(x), layer.base(x))

# --- surgery and adapters ---

# --- what others see of the layer ---

@pytest.mark.parametrize("bias", [True, False])
def test_it_answers_as_the_layer_that_it_wraps(bias):
    layer = random_layer(bias=bias)
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias and (layer.in_features, layer.out_features) == (12, 20)
    assert list(layer.state_dict()) == ["A", "B", "base.weight", *["base.bias"] * bias]
    with pytest.raises(KeyError): layer.weight = nn.Parameter(torch.zeros(20, 12))

@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_16_bit_base(low):
    layer, x = random_layer(low), torch.randn(4, 12).to(low)
    layer.A.data, layer.B.data = layer.A.data.float(), layer.B.data.float()
    assert layer(x).dtype == low and layer.delta_weight().dtype == torch.float32
    assert_close(layer(x).double(), naive(layer, x)[1], **TOLERANCE[low])
    layer(x).float().sum().backward()
    assert layer.A.grad.dtype == layer.B.grad.dtype == torch.float32 and layer.A.grad.count_nonzero()
