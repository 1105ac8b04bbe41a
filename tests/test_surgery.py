"Surgery on many models: what is wrapped, what is refused, and that nothing else changes."
import copy, os, pickle, re, threading
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pytest, torch, torch.nn as nn, torch.nn.functional as F
from tiny_llm.gpt import GPT, GPTConfig, fingerprint
from tiny_llm.lora import (LoRALinear, LoRAReport, add_lora_to_model, lora_modules, lora_param_count, lora_parameters, lora_report,
                           match_targets, remove_lora)

IDS = torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))

# --- models: each maker gives (model in eval mode, what it is called with) ---

def gpt(): return GPT(GPTConfig(vocab_size=48, max_seq_len=32, d_model=32, n_heads=4, n_layers=2, d_mlp=40)).eval(), IDS
def sequential(): return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16, bias=False)).eval(), X
def nested():
    two = lambda: nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)})
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.groups = nn.LayerNorm(16), nn.ModuleList(nn.ModuleList(two() for _ in range(2)) for _ in range(3))
        def forward(self, x):
            for group in self.groups:
                for m in group: x = x + m["down"](m["up"](self.norm(x)).relu())
            return x
    return Nested().eval(), X
def convnet():
    class ConvNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv1d(5, 6, 3, padding=1), nn.BatchNorm1d(6)
            self.mlp, self.head = nn.Sequential(nn.Linear(16, 16), nn.GELU()), nn.Linear(16, 4)
        def forward(self, x): return self.head(self.mlp(self.bn(self.conv(x))))
    return ConvNet().eval(), X
def decoder_layer(): # unlike the encoder layer it calls its two linear layers
    class Decoder(nn.Module):
        def __init__(self): super().__init__(); self.layer = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True)
        def forward(self, x): return self.layer(x, x)
    return Decoder().eval().requires_grad_(False), X # frozen: see test_freezing_alone_moves_pytorchs_cross_attention

def hugging_face(model, **how):
    T = pytest.importorskip("transformers")
    small = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=0)
    if model == "Llama": how["rope_parameters"] = dict(rope_type="default", rope_theta=10000.0)
    config = getattr(T, model + "Config")(**small, **how)
    torch.manual_seed(0)
    return config, T
def llama(tie=False):
    config, T = hugging_face("Llama", tie_word_embeddings=tie)
    return T.LlamaForCausalLM(config).eval(), IDS
def tied_llama(): return llama(tie=True)
def neox():
    config, T = hugging_face("GPTNeoX")
    return T.GPTNeoXForCausalLM(config).eval(), IDS
def bert():
    config, T = hugging_face("Bert")
    return T.BertForMaskedLM(config).eval(), IDS
def t5(kind="T5", **how):
    T = pytest.importorskip("transformers")
    config = getattr(T, kind + "Config")(vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, decoder_start_token_id=0, **how)
    return getattr(T, kind + "ForConditionalGeneration")(config).eval(), IDS
def llama_classifier():
    config, T = hugging_face("Llama", num_labels=3, pad_token_id=0)
    return T.LlamaForSequenceClassification(config).eval(), IDS

@torch.no_grad()
def answer(model, x):
    y = model(x)
    return getattr(y, "logits", y).clone()

def make(maker):
    torch.manual_seed(0)
    return maker()

def snapshot(model): return {k: v.clone() for k, v in model.state_dict().items()}, [(n, type(m)) for n, m in model.named_modules()], \
                            {n: p.requires_grad for n, p in model.named_parameters()}

def same(a, b): return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])

def train_step(model, x, lr=1.0):
    y = model(x)
    getattr(y, "logits", y).float().pow(2).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.grad is not None: p -= lr * p.grad / (p.grad.norm() + 1e-8); p.grad = None

# --- the whole cycle on every model ---

LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
CASES = [ # maker, targets, number of layers, last names
    (gpt, ("attn.qkv", "attn.W_o"), 4, {"qkv", "W_o"}),
    (gpt, "all-linear", 10, {"qkv", "W_o", "gate", "up", "down"}),
    (gpt, re.compile(r"blocks\.1\.mlp"), 3, {"gate", "up", "down"}),
    (gpt, "blocks.0.attn.qkv", 1, {"qkv"}),
    (gpt, ["up", "mlp.up"], 2, {"up"}),
    (sequential, "all-linear", 2, {"0", "2"}),
    (sequential, "2", 1, {"2"}),
    (nested, "down", 6, {"down"}),
    (nested, re.compile(r"groups\.[02]\."), 8, {"up", "down"}),
    (convnet, "all-linear", 1, {"0"}),
    (convnet, "head", 1, {"head"}),
    (decoder_layer, ("linear1", "linear2"), 2, {"linear1", "linear2"}),
    (llama, ("q_proj", "v_proj"), 4, {"q_proj", "v_proj"}),
    (llama, "all-linear", 14, LLAMA_LAYERS),
    (llama, "lm_head", 1, {"lm_head"}),
    (tied_llama, "all-linear", 14, LLAMA_LAYERS),
    (llama_classifier, "all-linear", 14, LLAMA_LAYERS),
    (neox, "query_key_value", 2, {"query_key_value"}),
    (neox, "all-linear", 8, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    (bert, ("query", "value"), 4, {"query", "value"}),
    (bert, "all-linear", 13, {"query", "key", "value", "dense"}),
]

@pytest.mark.parametrize("maker, targets, n, last", CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES])
def test_cycle(maker, targets, n, last):
    model, x = make(maker)
    before, base = answer(model, x), snapshot(model)
    total = sum(p.numel() for p in model.parameters())
    assert add_lora_to_model(model, r=2, alpha=4, targets=targets) is model

    layers = lora_modules(model)
    assert len(layers) == n and {k.rsplit(".", 1)[-1] for k in layers} == last
    assert torch.equal(answer(model, x), before), "a no-op before training, bit for bit"
    trainable = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{k}.{ab}" for k in layers for ab in "AB"}, "A and B train, nothing else"
    by_hand = sum(2 * (m.base.in_features + m.base.out_features) for m in layers.values())
    assert lora_param_count(model) == by_hand == sum(p.numel() for p in lora_parameters(model))
    report = lora_report(model)
    assert (report.trainable, report.total, len(report.rows)) == (by_hand, total + by_hand, n)

    train_step(model, x)
    assert not torch.equal(answer(model, x), before), "training has an effect"
    remove_lora(model)
    state, types, flags = snapshot(model)
    assert same((state, types), base[:2]), "base weights and layers as they were"
    assert torch.equal(answer(model, x), before) and not any(flags.values()), "same answers, still frozen"
    assert len(lora_modules(add_lora_to_model(model, r=2, targets=targets))) == n, "and it can be done again"

@pytest.mark.parametrize("maker", [gpt, nested, llama, tied_llama, neox])
def test_every_adapter_gets_a_gradient(maker):
    model, x = make(maker)
    add_lora_to_model(model, r=2, targets="all-linear")
    train_step(model, x) # from here on B is not zero, so that A has a gradient too
    y = model(x)
    getattr(y, "logits", y).pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in lora_parameters(model))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

def test_the_base_keeps_its_fingerprint():
    model, x = make(gpt)
    clean = fingerprint(model)
    add_lora_to_model(model)
    for _ in range(3): train_step(model, x)
    assert fingerprint(model) == clean == fingerprint(remove_lora(model))

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model, x = make(gpt)
    model.to(dtype)
    before = answer(model, x)
    add_lora_to_model(model, targets="all-linear")
    assert {p.dtype for p in lora_parameters(model)} == {dtype} and torch.equal(answer(model, x), before)

def test_train_and_eval_mode_stay():
    model, _ = make(gpt)
    model.train(); model.blocks[0].eval()
    add_lora_to_model(model, dropout=0.5)
    assert not any(m.training for m in model.blocks[0].modules()) and all(m.training for m in model.blocks[1].modules())
    remove_lora(model)
    assert not model.blocks[0].attn.qkv.training and model.blocks[1].attn.qkv.training

def test_r_alpha_dropout_arrive():
    model, _ = make(gpt)
    add_lora_to_model(model, r=4, alpha=2, targets="up", dropout=0.25)
    assert {(m.r, m.alpha, m.scaling, m.dropout.p) for m in lora_modules(model).values()} == {(4, 2, 0.5, 0.25)}

def test_a_shared_block_is_adapted_once():
    block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    model = nn.Sequential(block, block, block)
    before = answer(model, X)
    add_lora_to_model(model, r=2, targets="all-linear")
    assert len(lora_modules(model)) == 1 and isinstance(model[2][0], LoRALinear) and torch.equal(answer(model, X), before)
    train_step(model, X)
    assert not torch.equal(answer(model, X), before) and torch.equal(answer(remove_lora(model), X), before)

def test_freezing_alone_moves_pytorchs_cross_attention():
    "Its last bits depend on the flags (seen with torch 2.13), without any LoRA; surgery adds nothing to that."
    model, x = make(decoder_layer)
    frozen, free = answer(model, x), answer(model.requires_grad_(True), x)
    torch.testing.assert_close(free, frozen, atol=1e-5, rtol=1e-5)
    assert torch.equal(answer(add_lora_to_model(model, r=2, targets="linear1"), x), frozen)

def test_a_frozen_model_is_fine():
    model, x = make(gpt)
    add_lora_to_model(model.requires_grad_(False))
    assert all(p.requires_grad for p in lora_parameters(model))

# --- the output head ---

class Named(nn.Module):
    def __init__(self, name, tie=False, n_pos=0):
        super().__init__()
        if n_pos: self.pos = nn.Embedding(n_pos, 16) # as many positions as `up` has outputs, to mislead
        self.emb, self.up, self.down = nn.Embedding(48, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        setattr(self, name, nn.Linear(16, 48, bias=False))
        if tie: getattr(self, name).weight = self.emb.weight

@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", ["lm_head", "head", "to_logits", "unembed", "output"])
@pytest.mark.parametrize("inside", [False, True])
def test_all_linear_leaves_the_head_out(name, tie, inside):
    model = Named(name, tie, n_pos=24)
    if inside: model = nn.ModuleDict({"model": model})
    assert [n.rsplit(".", 1)[-1] for n in match_targets(model, "all-linear")] == ["up", "down"]

def test_a_tied_hugging_face_head_under_a_wrapper():
    model = nn.Sequential(tied_llama()[0])
    assert len(match_targets(model, "all-linear")) == 14

def test_layers_called_head_inside_blocks_are_layers():
    model = nn.ModuleList(nn.ModuleDict({"head": nn.Linear(4, 4), "score": nn.Linear(4, 4)}) for _ in range(2))
    assert len(match_targets(model, "all-linear")) == 4

def test_two_layers_of_the_embeddings_shape_are_no_head():
    model = nn.ModuleDict({"emb": nn.Embedding(48, 16), "a": nn.Linear(16, 48), "b": nn.Linear(16, 48)})
    assert match_targets(model, "all-linear") == ["a", "b"]

def test_a_tied_layer_is_the_head_among_others_of_its_shape():
    model = nn.ModuleDict({"emb": nn.Embedding(48, 16), "a": nn.Linear(16, 48), "b": nn.Linear(16, 48, bias=False)})
    model["b"].weight = model["emb"].weight
    assert match_targets(model, "all-linear") == ["a"]

def test_the_model_says_what_its_head_is():
    class Speaks(nn.Module):
        def __init__(self): super().__init__(); self.body, self.readout = nn.Linear(16, 16), nn.Linear(16, 60)
        def get_output_embeddings(self): return self.readout
    assert match_targets(nn.Sequential(Speaks()), "all-linear") == ["0.body"]

def test_the_head_on_request():
    assert match_targets(Named("lm_head"), "lm_head") == match_targets(Named("lm_head"), re.compile("head")) == ["lm_head"]

# --- wrong targets; whatever raises changes nothing ---

def refused(model, error=ValueError, match=None, **how):
    before = snapshot(model)
    with pytest.raises(error, match=match) as e: add_lora_to_model(model, **how)
    assert same(snapshot(model), before)
    return str(e.value)

@pytest.mark.parametrize("targets", ["kv", "attn", ("attn.qkv", "q_proj"), ["q_proj", "attn.qkv"], (), [], "", [""], re.compile("nothing"), ("all-linear",)])
def test_unknown_names_list_the_layers(targets):
    message = refused(make(gpt)[0], targets=targets)
    assert all(n in message for n in ("attn.qkv", "attn.W_o", "mlp.gate", "mlp.up", "mlp.down", "lm_head"))

def test_only_the_unknown_names_are_blamed():
    assert "matches ['q_proj', 'zz'];" in refused(make(gpt)[0], targets=("attn.qkv", "q_proj", "up", "zz"))

@pytest.mark.parametrize("targets", [None, 3, [3], [re.compile("a")], [None]])
def test_targets_of_another_type(targets): refused(make(gpt)[0], TypeError, targets=targets)

def test_a_model_without_linear_layers(): refused(nn.Sequential(nn.ReLU()), match="there are: \\[\\]", targets="all-linear", r=2)

def test_second_call_raises():
    model, x = make(gpt)
    add_lora_to_model(model)
    train_step(model, x)
    refused(model, match="already")
    refused(model, match="already", targets="mlp.up")

@pytest.mark.parametrize("how", [dict(r=0), dict(r=-1), dict(dropout=2.0), dict(r=17, targets=("gate", "W_o", "narrow"), rank_pattern={"narrow": 0})], ids=str)
def test_bad_numbers_change_nothing(how):
    model = make(gpt)[0]
    model.narrow = nn.Linear(32, 16) # the last layer, so that others come before the error
    refused(model, match="blocks.0|narrow", **how)

def test_a_bad_alpha_changes_nothing(): refused(make(gpt)[0], TypeError, alpha="16")

def test_flags_come_back_as_they_were():
    model = make(sequential)[0]
    model[0].bias.requires_grad_(False)
    refused(model, targets="all-linear", r=0) # wrong for the first layer
    refused(model, targets="all-linear", r=8, rank_pattern={"2": 0}, match="^2: ") # right for all but the last

def test_the_model_itself_is_a_layer():
    refused(nn.Linear(8, 8), match="LoRALinear\\(model\\)", targets="all-linear")
    refused(nn.Linear(8, 8), match="LoRALinear\\(model\\)", targets=re.compile(""))
    lora = LoRALinear(nn.Linear(8, 8), r=2)
    refused(lora, match="already")
    with pytest.raises(ValueError, match="model.base"): remove_lora(lora)

def test_remove_without_adapters_does_nothing():
    model = make(gpt)[0]; before = snapshot(model)
    assert remove_lora(model) is model and same(snapshot(model), before)

# --- layers that must not be wrapped ---

def test_multihead_attention():
    for model in (nn.MultiheadAttention(16, 2), nn.Sequential(nn.MultiheadAttention(16, 2)), nn.TransformerEncoderLayer(16, 2, 24)):
        refused(model, match="nn.MultiheadAttention reads this weight", targets="out_proj", r=2)
        refused(model, targets="all-linear", r=2)

@pytest.mark.parametrize("targets", ["linear1", "all-linear", re.compile("linear2")])
def test_transformer_encoder(targets):
    refused(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2), match="without calling", targets=targets, r=2)

def test_why_the_encoder_layer_is_refused():
    "Wrapped by hand, its fast path reads the weight and the adapter does not count."
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    layer.linear1 = LoRALinear(layer.linear1, r=2)
    with torch.no_grad():
        before = layer(X)
        layer.linear1.B.normal_()
        assert torch.equal(layer(X), before)

def tied_pair():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    return model

def same_layer_twice():
    line = nn.Linear(16, 16)
    return nn.Sequential(line, nn.ReLU(), line)

def same_layer_in_two_blocks():
    line = nn.Linear(16, 16)
    return nn.Sequential(nn.Sequential(line), nn.Sequential(line))

@pytest.mark.parametrize("maker, other", [(tied_pair, r"1\.weight"), (same_layer_twice, "2"), (same_layer_in_two_blocks, r"1\.0")])
def test_tied_layers(maker, other): refused(maker(), match=f"shared with .*{other}", targets="all-linear", r=2)

@pytest.mark.parametrize("maker", [lambda: make(gpt)[0], lambda: tied_llama()[0]])
def test_tied_heads(maker): refused(maker(), match="lm_head is shared with .*(tok_emb|embed_tokens)", targets="lm_head", r=2)

class Router(nn.Linear):
    def forward(self, x): return super().forward(x).softmax(-1)
class Renamed(nn.Linear): "Only another name."
class Adapted(nn.Linear): # as other libraries write their adapters
    def __init__(self, i, o): super().__init__(i, o); self.lora = nn.ModuleDict({"a": nn.Linear(i, 2), "b": nn.Linear(2, o)})
    def forward(self, x): return super().forward(x) + self.lora["b"](self.lora["a"](x))
class Packed(nn.Parameter): "As quantization libraries keep packed weights."

def packed():
    layer = nn.Linear(8, 8)
    layer.weight = Packed(torch.zeros(32, dtype=torch.uint8), requires_grad=False)
    return layer
def integer():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return layer

@pytest.mark.parametrize("layer, why", [
    (lambda: Router(8, 8), "Router is an nn.Linear with a forward of its own"), (lambda: Adapted(8, 8), "Adapted"),
    (packed, "Packed"), (integer, "int8"), (lambda: nn.Linear(8, 8).to(torch.float8_e4m3fn), "float8"),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "computed")])
def test_odd_layers(layer, why):
    refused(nn.ModuleDict({"good": nn.Linear(8, 8), "odd": layer()}), match=why, targets="all-linear", r=2)

def test_a_layer_that_is_not_made_yet():
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
    with pytest.raises(ValueError, match="not made yet"): add_lora_to_model(model, r=2, targets="all-linear")
    model(X)
    assert len(lora_modules(add_lora_to_model(model, r=2, targets="all-linear"))) == 1

def test_layers_inside_an_adapter_of_others():
    refused(nn.ModuleDict({"q": Adapted(8, 8)}), match="inside a Adapted", targets="lora.a", r=2)
    refused(Adapted(8, 8), targets="lora.a", r=2)

def test_a_subclass_that_only_has_another_name():
    model = nn.Sequential(Renamed(16, 16)); before = answer(model, X)
    assert torch.equal(answer(add_lora_to_model(model, r=2, targets="0"), X), before)
    assert type(remove_lora(model)[0]) is Renamed

@pytest.mark.parametrize("targets, n", [("c_attn", 1), (("c_attn", "c_proj"), 3), ("all-linear", 4)])
def test_gpt2_with_its_transposed_layers(targets, n):
    T = pytest.importorskip("transformers")
    model = T.GPT2LMHeadModel(T.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=48, n_positions=32, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad(): before = model(ids).logits
    add_lora_to_model(model, r=2, targets=targets)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before) and len(lora_modules(model)) == n
        for m in lora_modules(model).values(): m.B.normal_()
        assert (model(ids).logits - before).abs().max() > 0.01
        assert torch.equal(remove_lora(model)(ids).logits, before)

def test_convolutions_are_named_as_not_supported():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8))
    assert "not supported: Conv2d (0)" in refused(model, targets="q_proj", r=2)
    assert "not supported" not in refused(nested()[0], targets="q_proj", r=2) # a norm has nothing to adapt

@pytest.mark.parametrize("how, why", [(dict(exclude="nothing"), "nothing"), (dict(targets="all-linear", exclude="all-linear"), "without 'all-linear'"),
    (dict(rank_pattern={"nothing": 4}), "rank_pattern.*nothing"), (dict(alpha_pattern={"(": 4}), "cannot be used"), (dict(alpha_pattern={"blocks.0.attn.[[:alpha:]]*": 4}), "cannot be used"), (dict(alpha_pattern={"blocks.0.attn.[[a-z]]*": 4}), "classes in classes"), (dict(alpha_pattern={"blocks.0.attn.[:a-z]*": 4}), "classes in classes"),
    (dict(rank_pattern={"(?:x{2147483647}){2147483647}": 4}), "cannot be used"), (dict(rank_pattern={"(?:attn.qkv){e<=1}": 4}), "cannot be used"), (dict(rank_pattern={"attn.qkv": 0}), "r=0"),
    (dict(alpha_pattern={"attn.qkv": -1}), "alpha=-1")])
def test_exclude_and_patterns_that_do_not_fit(how, why):
    refused(make(gpt)[0], match=why, **how)

def test_exclude_and_patterns():
    model = add_lora_to_model(make(gpt)[0], r=2, alpha=4, targets="all-linear", exclude=("mlp.up", "W_o"), use_rslora=True,
                              rank_pattern={"blocks.0.attn.qkv": 3, "qkv": 4}, alpha_pattern={r"blocks\.1\..*": 9})
    got = {n: (m.r, round(m.scaling * m.r ** 0.5, 6)) for n, m in lora_modules(model).items()}
    assert got["blocks.0.attn.qkv"] == (3, 4) and got["blocks.1.attn.qkv"] == (4, 9) and got["blocks.0.mlp.gate"] == (2, 4)
    assert not any(n.endswith(("up", "W_o")) for n in got)

# --- counts ---

@pytest.mark.parametrize("targets, n", [("attn.qkv", 49_152), (("attn.qkv", "attn.W_o"), 73_728), ("all-linear", 209_664)])
def test_counts_of_the_book(targets, n):
    with torch.device("meta"): model = GPT(GPTConfig())
    assert lora_param_count(add_lora_to_model(model, targets=targets)) == n

@pytest.mark.parametrize("targets, n", [(("q_proj", "k_proj", "v_proj", "o_proj"), 8_388_608), (("q_proj", "v_proj"), 4_194_304)])
def test_counts_of_llama_7b(targets, n):
    T = pytest.importorskip("transformers")
    config = T.LlamaConfig(rope_parameters=dict(rope_type="default", rope_theta=10000.0)) # the defaults are the 7B shape
    with torch.device("meta"): model = T.LlamaForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    add_lora_to_model(model, targets=targets)
    assert total == 6_738_415_616 and lora_param_count(model) == n and all(p.is_meta for p in lora_parameters(model))

# --- the report ---

def test_report_text():
    with torch.device("meta"): model = GPT(GPTConfig())
    report = lora_report(add_lora_to_model(model))
    text = report._repr_markdown_()
    assert "| attn.qkv | 6 | 768 x 256 | 8 | 49,152 |" in text and "73,728 / 5,868,800 = 1.26 %, one in 80 |" in text
    assert report.ratio == 73_728 / 5_868_800 and report.rows[0] == ("blocks.0.attn.qkv", (768, 256), 8, 8192)

def test_report_without_adapters():
    model = make(gpt)[0]
    assert lora_report(model).ratio == 1 and "one in 1.0" in repr(lora_report(model))
    assert lora_report(model.requires_grad_(False)).ratio == 0 and "one in" not in repr(lora_report(model))
    assert lora_report(nn.ReLU()).ratio == 0 and LoRAReport([], 1, 1).ratio == 1

def test_targets_are_names():
    with pytest.raises(TypeError, match="targets are names"): match_targets(GPT(GPTConfig(d_model=32, n_heads=2, n_layers=1, d_mlp=48)), ["attn.qkv", 3])

def test_every_line_of_the_report_has_the_same_cells():
    lines = repr(lora_report(add_lora_to_model(GPT(GPTConfig(d_model=32, n_heads=2, n_layers=1, d_mlp=48)), r=2))).splitlines()
    assert len(lines) == 5 and {line.count("|") for line in lines} == {6}

def test_tolerances_are_tight():
    from tiny_llm.lora import TOLERANCE
    assert all(0 < v <= 400 * torch.finfo(dtype).eps ** 0.5 and v < 0.05 for dtype, t in TOLERANCE.items() for v in t.values())
    assert max(TOLERANCE[torch.float64].values()) < 1e-8 and max(TOLERANCE[torch.float32].values()) < 1e-3

# --- models that look at their layers ---

@pytest.mark.parametrize("kind, how", [("T5", {}), ("UMT5", {}), ("SwitchTransformers", dict(num_experts=2))])
def test_a_model_that_looks_at_the_type_of_a_weight(kind, how):
    (model, ids), targets = t5(kind, **how), "all-linear"
    add_lora_to_model(model, r=1, targets=targets)
    with torch.no_grad():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        for p in lora_parameters(model): p.normal_(std=0.3)
        assert (model(input_ids=ids, decoder_input_ids=ids).logits - before).abs().max() > 1e-3

class Multiplies(nn.Module):
    "One layer is called, one is only read, one is read by the module above."
    def __init__(self): super().__init__(); self.called, self.read, self.far = (nn.Linear(16, 16) for _ in range(3))
    def forward(self, x):
        if self.called.weight.dtype == x.dtype and isinstance(self.called.weight, torch.Tensor): x = self.called(x)
        return F.linear(x, self.read.weight)

class Above(nn.Module):
    def __init__(self): super().__init__(); self.inner = Multiplies()
    def forward(self, x): return self.inner(x) @ self.inner.far.weight.T

def test_a_layer_whose_weight_is_multiplied_by_others_is_refused():
    for name in ("read", "far"): refused(Above(), match=f"{name}: .* reads this weight", targets=name, r=2)
    assert list(lora_modules(add_lora_to_model(Above(), r=2, targets="called"))) == ["inner.called"]

@pytest.mark.parametrize("kind, how, name", [("Mamba", dict(hidden_size=16, num_hidden_layers=1, state_size=4), "out_proj"),
    ("Rwkv", dict(hidden_size=16, num_hidden_layers=2, attention_hidden_size=16), "attention.output")])
def test_models_that_multiply_with_their_weights(kind, how, name):
    T = pytest.importorskip("transformers")
    refused(getattr(T, kind + "ForCausalLM")(getattr(T, kind + "Config")(vocab_size=48, **how)), match=f"{name}: {kind}.* reads", targets=name, r=2)

# --- wrapped models ---

class Holder(nn.Module):
    def __init__(self, model): super().__init__(); self.held = model
    def forward(self, x): return self.held(x)

WRAPPERS = {"compile": torch.compile, "parallel": nn.DataParallel, "both": lambda m: nn.DataParallel(torch.compile(m)), "holder": Holder}

@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_surgery_on_a_wrapped_model_is_that_on_the_model(wrap):
    model = make(gpt)[0]; wrapped, before = wrap(model), snapshot(model)
    assert match_targets(wrapped, "all-linear") == match_targets(model, "all-linear")
    assert add_lora_to_model(wrapped, r=2) is wrapped and lora_modules(wrapped) == lora_modules(model) and len(lora_modules(model)) == 4
    assert remove_lora(wrapped) is wrapped and same(snapshot(model.requires_grad_(True)), before)

def test_what_only_contains_a_model_is_a_model():
    model = nn.ModuleDict({"a": make(gpt)[0], "b": nn.Linear(4, 4)})
    assert lora_modules(add_lora_to_model(model, r=2)).keys() == {f"a.blocks.{i}.attn.{n}" for i in (0, 1) for n in ("qkv", "W_o")}

# --- threads, copies, and what is left behind ---

def test_a_change_waits_for_a_forward_on_its_way():
    model, ids = make(gpt); add_lora_to_model(model, r=2)
    began, go_on, order = threading.Event(), threading.Event(), []
    handle = model.blocks[1].register_forward_pre_hook(lambda *args: (began.set(), go_on.wait(10)) and None)
    forward = threading.Thread(target=lambda: (model(ids), order.append("forward")))
    change = threading.Thread(target=lambda: (remove_lora(model), order.append("change")))
    forward.start(); began.wait(10); change.start()
    change.join(0.2); assert lora_modules(model) and not order # it waits
    go_on.set(); forward.join(10); change.join(10)
    assert order == ["forward", "change"] and not lora_modules(model)
    handle.remove()

def test_a_forward_that_failed_does_not_block():
    model, ids = make(gpt); add_lora_to_model(model, r=2)
    with pytest.raises(Exception): model("no tensor")
    thread = threading.Thread(target=remove_lora, args=(model,)); thread.start(); thread.join(10)
    assert not thread.is_alive() and not lora_modules(model)

@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_removing_leaves_nothing_behind(copied):
    model, ids = make(gpt); before = answer(model, ids)
    other = copied(add_lora_to_model(model, r=2))
    for m in (other, model):
        assert lora_modules(m)
        remove_lora(m)
        assert not [k for k in vars(m) if "lora" in k] and not m._forward_hooks and not m._forward_pre_hooks and torch.equal(answer(m, ids), before)

def test_a_rank_above_the_size_of_a_layer_is_told_once():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(1, 2)) # a gate with one output
    with pytest.warns(UserWarning, match=r"larger than 2 of the layers.*'1', '2'") as told: add_lora_to_model(model, r=4, targets="all-linear")
    assert len(told) == 1 and lora_modules(model)["1"].B.shape == (1, 4)
