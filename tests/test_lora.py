"Layer, surgery, adapter files and merging."
import copy, json, re
import pytest, torch, torch.nn as nn
from torch.testing import assert_close
from tiny_llm.adapter import disable_lora, load_adapter, load_with_lora, merge_lora, save_adapter, unmerge_lora
from tiny_llm.files import BadFileError
from tiny_llm.gpt import GPT, GPTConfig, fingerprint, save_checkpoint
from tiny_llm.lora import LoRALinear, add_lora_to_model, lora_modules, lora_param_count, lora_parameters, lora_report, remove_lora

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

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_layer(dtype, bias):
    base, x = nn.Linear(12, 20, bias=bias).to(dtype), torch.randn(2, 3, 12).to(dtype)
    layer = LoRALinear(base, r=3, alpha=6)
    assert layer.scaling == 2 and layer.A.shape == (3, 12) and layer.B.shape == (20, 3) and layer.A.dtype == dtype
    assert torch.equal(layer(x), base(x))
    with torch.no_grad(): layer.B.normal_()
    tol = dict(atol=1e-1, rtol=1e-1) if dtype == torch.bfloat16 else dict(atol=1e-6, rtol=1e-5)
    assert_close(layer(x), base(x) + 2 * (x @ layer.A.T @ layer.B.T), **tol)

def test_dropout_only_while_training():
    layer, x = LoRALinear(nn.Linear(64, 64), r=4, dropout=0.5), torch.randn(8, 64)
    with torch.no_grad(): layer.B.normal_()
    assert not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))

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
