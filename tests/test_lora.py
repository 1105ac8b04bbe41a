"Layer, surgery, adapter files and merging."
import copy, io, json, re
import pytest, torch, torch.nn as nn
from torch.testing import assert_close
from tiny_llm.adapter import disable_lora, load_adapter, load_with_lora, merge_lora, save_adapter, unmerge_lora
from tiny_llm.files import BadFileError
from tiny_llm.gpt import GPT, GPTConfig, fingerprint, save_checkpoint
from tiny_llm.lora import TOLERANCE, LoRALinear, add_lora_to_model, lora_modules, lora_param_count, lora_parameters, lora_report, remove_lora

CONFIG = GPTConfig(vocab_size=97, max_seq_len=64, d_model=32, n_heads=4, n_layers=2, d_mlp=48)

def small(seed=0): torch.manual_seed(seed); return GPT(CONFIG).eval()

def trained(model, **how):
    "LoRA with one real optimizer step twice over, so that neither A nor B is where it started."
    add_lora_to_model(model, **how)
    opt = torch.optim.SGD(lora_parameters(model), lr=10.0)
    for _ in range(2):
        model(torch.arange(20)[None]).pow(2).sum().backward()
        opt.step(); opt.zero_grad()
    return model

IDS = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0))

@torch.no_grad()
def logits(model): return model(IDS)

# --- the layer ---

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
@pytest.mark.parametrize("shape, r", [((20, 12), 1), ((20, 12), 3), ((12, 20), 12), ((16, 16), 16)])
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
    (dict(r=0), "1…12"), (dict(r=-1), "1…12"), (dict(r=13), "1…12"), (dict(r=2.5), "whole"), (dict(r=8.0), "whole"), (dict(r=True), "whole"),
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

def test_everything_else_is_frozen():
    model = add_lora_to_model(small())
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    assert lora_report(model).trainable == lora_param_count(model) == 2 * 8 * (32 + 96 + 32 + 32)

@pytest.mark.parametrize("targets, n", [("attn.qkv", 2), (["up", "down"], 4), ("all-linear", 10), (re.compile("blocks.1"), 5)])
def test_targets(targets, n): assert len(lora_modules(add_lora_to_model(small(), targets=targets))) == n

@pytest.mark.parametrize("targets", [("attn.qkv", "q_proj"), "kv", re.compile("nothing")])
def test_wrong_targets_list_the_right_ones(targets):
    model = small()
    with pytest.raises(ValueError, match="attn.W_o"): add_lora_to_model(model, targets=targets)
    assert not lora_modules(model) and all(p.requires_grad for p in model.parameters())

def test_wrong_rank_changes_nothing():
    model = small()
    with pytest.raises(ValueError, match="rank"): add_lora_to_model(model, r=33)
    assert not lora_modules(model) and all(p.requires_grad for p in model.parameters())

def test_second_call_raises():
    model = add_lora_to_model(small())
    with pytest.raises(ValueError, match="already"): add_lora_to_model(model)

def test_tied_head_is_refused():
    with pytest.raises(ValueError, match="shared"): add_lora_to_model(small(), targets="lm_head")

def test_multihead_attention_is_refused():
    with pytest.raises(ValueError, match="MultiheadAttention"): add_lora_to_model(nn.TransformerEncoderLayer(16, 2), targets="out_proj", r=2)

def test_remove_restores():
    model = small(); before = logits(model)
    remove_lora(trained(model))
    assert torch.equal(logits(model), before) and not lora_modules(model)

def test_training_leaves_the_base_alone():
    model = small(); print_, before = fingerprint(model), logits(model)
    trained(model)
    assert fingerprint(model) == print_ and not torch.allclose(logits(model), before, atol=1e-3)

def test_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    cfg = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(cfg).eval()
    with torch.no_grad(): before = model(IDS % 50).logits
    add_lora_to_model(model, r=2, targets=("q_proj", "v_proj"))
    with torch.no_grad(): assert torch.equal(model(IDS % 50).logits, before)
    assert len(lora_modules(model)) == 4 and "lm_head" not in lora_modules(add_lora_to_model(remove_lora(model), r=2, targets="all-linear"))

def test_save_load_round_trip(tmp_path):
    model = trained(small(), r=4, targets="all-linear")
    save_checkpoint(small(), tmp_path/"base.safetensors")
    save_adapter(model, tmp_path/"a")
    assert torch.equal(logits(load_adapter(small(), tmp_path/"a")), logits(model))
    assert_close(logits(load_with_lora(tmp_path/"base.safetensors", tmp_path/"a").cpu()), logits(model), atol=1e-5, rtol=1e-5)

def test_load_onto_layers_that_exist(tmp_path):
    model = trained(small()); save_adapter(model, tmp_path)
    other = add_lora_to_model(small())
    assert torch.equal(logits(load_adapter(other, tmp_path)), logits(model))

def break_it(path, how):
    "Damage a saved adapter folder."
    weights, config = path/"adapter_model.safetensors", path/"adapter_config.json"
    from safetensors.torch import load_file, save_file
    if how == "truncated": weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "config is a list": config.write_text("[]")
    elif how == "config is no JSON": config.write_text("{")
    elif how == "other rank": config.write_text(json.dumps({**json.loads(config.read_text()), "r": 4}))
    elif how == "dora": config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    else:
        state = load_file(weights); key = sorted(state)[0]
        if how == "missing tensor": del state[key]
        elif how == "extra tensor": state["base_model.model.blocks.9.attn.qkv.lora_A.weight"] = torch.zeros(8, 32)
        elif how == "wrong shape": state[key] = torch.zeros(8, 31)
        save_file(state, weights)

@pytest.mark.parametrize("how", ["truncated", "config is a list", "config is no JSON", "other rank", "dora", "missing tensor", "extra tensor", "wrong shape"])
@pytest.mark.parametrize("has_lora", [False, True])
def test_bad_adapters_change_nothing(tmp_path, how, has_lora):
    save_adapter(trained(small()), tmp_path)
    break_it(tmp_path, how)
    model = trained(small()) if has_lora else small()
    before, state = logits(model), copy.deepcopy(model.state_dict())
    with pytest.raises(BadFileError): load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before) and model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

def test_other_base_is_refused(tmp_path):
    save_adapter(trained(small()), tmp_path)
    with pytest.raises(BadFileError, match="another base"): load_adapter(small(seed=1), tmp_path)

def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"): load_adapter(small(), tmp_path/"none")

def test_merge():
    model = small(); base = logits(model)
    trained(model, targets="all-linear"); with_lora = logits(model)
    assert (with_lora - base).abs().max() > 0.1
    merge_lora(model)
    assert_close(logits(model), with_lora, atol=1e-4, rtol=1e-4)
    assert {type(m) for m in model.modules()} & {LoRALinear} == set()
    with pytest.raises(ValueError, match="merged"): merge_lora(model)
    with pytest.raises(ValueError, match="merg"): save_adapter(model, "nowhere")
    assert torch.equal(logits(unmerge_lora(model)), with_lora) and torch.equal(logits(remove_lora(model)), base)
    with pytest.raises(ValueError): unmerge_lora(model)

def test_merge_refuses_nan_and_changes_nothing():
    model = trained(small())
    with torch.no_grad(): list(lora_modules(model).values())[-1].B[0, 0] = float("nan")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NaN"): merge_lora(model)
    assert model.state_dict().keys() == state.keys()

def test_disable_comes_back_after_an_error():
    model = trained(small()); with_lora = logits(model)
    with pytest.raises(RuntimeError), disable_lora(model):
        assert not lora_modules(model)
        raise RuntimeError
    assert torch.equal(logits(model), with_lora)
