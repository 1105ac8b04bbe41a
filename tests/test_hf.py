"Our GPT as a Hugging Face Llama and back: bases, adapters, and what must be refused."
import copy, itertools, json, pickle
import pytest, torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from tiny_llm.adapter import disable_lora, load_adapter, merge_lora, read_adapter, save_adapter
from tiny_llm.data import ASSETS, bundled_stories
from tiny_llm.files import BadFileError
from tiny_llm.generate import load_base
from tiny_llm.gpt import GPT, GPTConfig, fingerprint
from tiny_llm.hf import export_adapter, export_base, from_llama, fuse, import_adapter, import_base, llama_names, to_llama
from tiny_llm.lora import TOLERANCE, add_lora_to_model, lora_modules
from tiny_llm.bpe import BPETokenizer

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{begin}") for begin in ("`is_gradient_checkpointing`", "Model has `tie_word", "Setting `save_embedding")]
SHAPE = dict(vocab_size=300, max_seq_len=64, d_model=32, n_heads=4, n_layers=2, d_mlp=48)
IDS = torch.randint(0, 258, (2, 16), generator=torch.Generator().manual_seed(0))
TIGHT = dict(atol=1e-6, rtol=1e-6)

@pytest.fixture(scope="module")
def tok(): return BPETokenizer.train([r["story"] for r in bundled_stories()[:20]], 300)

def small(seed=0, **how):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SHAPE, **how})).eval()

def with_lora(model, **how):
    "B is random, so the adapter matters."
    add_lora_to_model(model, **{"r": 4, **how})
    with torch.no_grad(): [m.B.normal_(std=0.3, generator=torch.Generator().manual_seed(i)) for i, m in enumerate(lora_modules(model).values())]
    return model

@torch.no_grad()
def logits(model): return getattr(out := model(IDS), "logits", out)

def llama_of(model, tok, folder):
    export_base(model, tok, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

def picture(model): return [(n, type(m)) for n, m in model.named_modules()], [(n, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()]
def same(a, b): return a[0] == b[0] and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a[1], b[1], strict=True))

# Bases

@pytest.mark.parametrize("how", [{}, dict(tie_weights=False), dict(rope_theta=500.0, norm_eps=1e-6), dict(n_layers=1, n_heads=2), dict(max_seq_len=100)])
def test_base_there_and_back(tmp_path, tok, how):
    model = small(**how)
    assert_close(logits(llama_of(model, tok, tmp_path)), logits(model), **TIGHT)
    again, same_tok = import_base(tmp_path)
    assert fingerprint(again) == fingerprint(model) and again.config == model.config and same_tok.vocab == tok.vocab and not again.training

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_base_in_half_precision(tmp_path, tok, dtype):
    model = small().to(dtype)
    llama = llama_of(model, tok, tmp_path)
    assert llama.dtype == dtype and all(torch.equal(v, llama.state_dict()[k]) for k, v in to_llama(model.state_dict()).items())
    again, _ = import_base(tmp_path, dtype)
    assert all(torch.equal(v, model.state_dict()[k]) and v.dtype == dtype for k, v in again.state_dict().items())

def test_shipped_base(tmp_path):
    model, tok = load_base(device="cpu")
    ids = torch.tensor([tok.encode(bundled_stories()[0]["story"])[:100]])
    with torch.no_grad(): assert_close(llama_of(model, tok, tmp_path)(ids).logits, model(ids), **TOLERANCE[torch.float32])
    assert fingerprint(import_base(tmp_path)[0]) == fingerprint(model)

def test_tokens(tmp_path):
    model, tok = load_base(device="cpu")
    export_base(model, tok, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["", " ", "\n\n a\tb ", "🐻‍❄️ 🇩🇪", "שלום", "\x00\x07", "a" * 3000, "<|endoftext|><|pad|>", "<|endof", "é é"] + [r["story"] for r in bundled_stories()]
    for t in texts: assert theirs(t)["input_ids"] == tok.encode(t) and theirs.decode(tok.encode(t)) == t
    assert theirs(texts)["input_ids"] == tok.encode_batch(texts)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id, theirs.padding_side) == (tok.eot, tok.eot, tok.pad, "left")
    assert tok.eot not in theirs("say <|endoftext|> twice: <|endoftext|>")["input_ids"]

def test_a_model_with_adapters_exports_its_base_and_a_merged_one_its_merged_weights(tmp_path, tok):
    model, plain = with_lora(small()), logits(small())
    assert_close(logits(llama_of(model, tok, tmp_path/"a")), plain, **TIGHT)
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.01
    assert_close(logits(llama_of(merge_lora(model), tok, tmp_path/"b")), expected, **TIGHT)

def test_transformers_own_folder(tmp_path):
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40)
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with pytest.warns(UserWarning, match="tokenizer"): model, none = import_base(tmp_path)
    ids = IDS % 50
    with torch.no_grad(): assert none is None; assert_close(model(ids), llama(ids).logits, **TIGHT)

def edit(name, change):
    def apply(folder): (folder/name).write_text(json.dumps(change(json.loads((folder/name).read_text()))))
    return apply

def config(**fields): return edit("config.json", lambda c: {**c, **fields})
def weights(change): return lambda folder: save_file(change(load_file(folder/"model.safetensors")), folder/"model.safetensors")
def write(name, data): return lambda folder: (folder/name).write_bytes(data)

REFUSED = {
    "grouped-query": (config(num_key_value_heads=2), "grouped-query attention"), "another architecture": (config(model_type="mistral"), "mistral"),
    "scaled positions": (config(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0)), "llama3"), "old style scaling": (config(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=None), "linear"),
    "partial positions": (config(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)), "partial"), "another activation": (config(hidden_act="gelu"), "gelu"),
    "biases": (config(attention_bias=True), "attention_bias"), "MLP biases": (config(mlp_bias=True), "mlp_bias"), "wide heads": (config(head_dim=16), "head_dim"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "quantization_config"), "another width": (config(hidden_size=64, head_dim=16), "shape"),
    "more layers": (config(num_hidden_layers=3), "missing"), "fewer layers": (config(num_hidden_layers=1), "unexpected"), "a field is missing": (edit("config.json", lambda c: {k: v for k, v in c.items() if k != "hidden_size"}), "hidden_size"),
    "no JSON": (write("config.json", b"{"), "not a usable Llama"), "JSON of another kind": (write("config.json", b"[1]"), "not a usable Llama"), "width is text": (config(hidden_size="32"), "not a usable Llama"),
    "heads are 0": (config(num_attention_heads=0, num_key_value_heads=0), "not a usable Llama"),
    "a tensor is missing": (weights(lambda t: {k: v for k, v in t.items() if "q_proj" not in k}), "missing"), "a tensor more": (weights(lambda t: {**t, "x.weight": torch.zeros(2)}), "unexpected"),
    "another shape": (weights(lambda t: {**t, "model.norm.weight": torch.zeros(3)}), "shape"), "a cut file": (lambda f: (f/"model.safetensors").write_bytes((f/"model.safetensors").read_bytes()[:-9]), "not a usable Llama"),
    "a pickle": (write("model.safetensors", pickle.dumps({"a": 1})), "not a usable Llama"), "no weights": (lambda f: (f/"model.safetensors").rename(f/"pytorch_model.bin"), "no pickles"),
    "an index that points elsewhere": (write("model.safetensors.index.json", json.dumps({"weight_map": {"x": "../other.safetensors"}}).encode()), "out of its folder"),
    "an index without a map": (write("model.safetensors.index.json", b"{}"), "weight_map"), "an index of nothing": (write("model.safetensors.index.json", b'{"weight_map": {}}'), "missing tensors"),
}

@pytest.mark.parametrize("what", REFUSED)
def test_a_base_that_does_not_fit(tmp_path, tok, what):
    export_base(small(), tok, tmp_path)
    change, why = REFUSED[what]; change(tmp_path)
    with pytest.raises(BadFileError, match=why) as e: import_base(tmp_path)
    assert str(tmp_path) in str(e.value)

def test_no_base(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"): import_base(tmp_path/"none")

def test_names():
    names = [n for k in small(tie_weights=False).state_dict() for n in llama_names(k.removesuffix(".weight"))]
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    assert {f"{n}.weight" for n in names} == set(transformers.LlamaForCausalLM(config).state_dict())

def test_the_state_comes_back():
    state = small().state_dict()
    back = from_llama(to_llama(state), small().config)
    assert list(back) == list(state) and all(torch.equal(v, state[k]) for k, v in back.items())

# Adapters

ADAPTERS = [{}, dict(targets="all-linear"), dict(targets="attn.qkv", r=1, alpha=3), dict(targets="mlp.down", dropout=0.1), dict(use_rslora=True, alpha=5),
            dict(targets="all-linear", rank_pattern={"qkv": 6, "blocks.0.mlp.up": 2}, alpha_pattern={"W_o": 3, "blocks.1.attn.qkv": 9}), dict(targets=("blocks.1.attn.qkv", "blocks.0.mlp.gate"))]

@pytest.mark.parametrize("how", ADAPTERS)
def test_adapter_to_peft_and_back(tmp_path, tok, how):
    model = with_lora(small(), **how); expected = logits(model)
    export_adapter(model, tmp_path/"a", base="somewhere")
    theirs = peft.PeftModel.from_pretrained(llama_of(model, tok, tmp_path/"base"), tmp_path/"a").eval()
    assert (expected - logits(small())).abs().max() > 0.01
    assert_close(logits(theirs), expected, **TIGHT)
    again = import_adapter(small(), tmp_path/"a")
    assert torch.equal(logits(again), expected) and {n: m.r for n, m in lora_modules(again).items()} == {n: m.r for n, m in lora_modules(model).items()}
    assert {n.rpartition(".")[2] for n, p in again.named_parameters() if p.requires_grad} == {"A", "B"}
    assert read_adapter(tmp_path/"a")[0]["base_model_name_or_path"] == "somewhere"

def test_an_exported_adapter_loads_on_the_exported_base_with_our_own_loader(tmp_path, tok):
    "The fingerprint in the note is that of the exported base."
    model = with_lora(small(tie_weights=False)); export_adapter(model, tmp_path/"a")
    llama = llama_of(model, tok, tmp_path/"base")
    assert_close(logits(load_adapter(llama, tmp_path/"a")), logits(model), **TIGHT)
    save_adapter(llama, tmp_path/"b")
    assert torch.equal(logits(import_adapter(small(tie_weights=False), tmp_path/"b")), logits(model))
    with pytest.raises(BadFileError, match="another base"): import_adapter(small(seed=1, tie_weights=False), tmp_path/"b")

def pefts(tmp_path, tok, model=None, seed=0, **config):
    "An adapter of PEFT with random numbers on the exported base: (its logits, its folder)."
    torch.manual_seed(seed)
    theirs = peft.get_peft_model(llama_of(model or small(), tok, tmp_path/"base"), peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **config}))
    with torch.no_grad(): [p.normal_(std=0.1) for n, p in theirs.named_parameters() if "lora_" in n]
    theirs.save_pretrained(tmp_path/"theirs", save_embedding_layers=False)
    return logits(theirs.eval()), tmp_path/"theirs"

@pytest.mark.parametrize("config, ranks", [
    (dict(target_modules=["q_proj", "k_proj", "v_proj"]), {12}), (dict(target_modules=["q_proj", "v_proj"]), {8}), (dict(target_modules=["k_proj"]), {4}),
    (dict(target_modules="all-linear", r=2), {6, 2}), (dict(target_modules=["q_proj", "v_proj", "o_proj"], use_rslora=True, lora_alpha=3), {8, 4}),
    (dict(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 1}, alpha_pattern={"v_proj": 5}), {5}),
    (dict(target_modules=r".*layers\.1.*(q|down)_proj"), {4}), (dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0]), {4}),
    (dict(target_modules="all-linear", exclude_modules=["k_proj", "down_proj"], r=2), {4, 2})])
def test_adapters_of_peft(tmp_path, tok, config, ranks):
    expected, folder = pefts(tmp_path, tok, **config)
    model = import_adapter(small(), folder)
    assert (expected - logits(small())).abs().max() > 1e-4 and {m.r for m in lora_modules(model).values()} == ranks
    assert_close(logits(model), expected, **TIGHT)
    save_adapter(model, tmp_path/"ours")
    assert torch.equal(logits(load_adapter(small(), tmp_path/"ours")), logits(model))
    with disable_lora(model): assert torch.equal(logits(model), logits(small()))
    assert_close(logits(merge_lora(model)), expected, **TIGHT)

@pytest.mark.parametrize("config, why", [
    (dict(target_modules=["embed_tokens"]), "embed_tokens"), (dict(target_modules=["q_proj"], use_dora=True), "use_dora"),
    (dict(target_modules=["q_proj"], bias="all"), "bias"), (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(target_modules=["lm_head"]), "tok_emb"), (dict(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "trainable_token_indices")])
def test_what_cannot_be_represented(tmp_path, tok, config, why):
    _, folder = pefts(tmp_path, tok, **config)
    model = small().train(); before = picture(model)
    with pytest.raises(BadFileError, match=why): import_adapter(model, folder)
    assert same(picture(model), before)

def test_ranks_that_add_up_to_more_than_the_layer_has(tmp_path, tok):
    expected, folder = pefts(tmp_path, tok, target_modules=["q_proj", "v_proj"], r=20)
    with pytest.warns(UserWarning, match="larger than 2 of the layers"): model = import_adapter(small(), folder)
    assert {m.r for m in lora_modules(model).values()} == {40}
    assert_close(logits(model), expected, **TIGHT)

def test_a_tokenizer_of_another_model_is_not_exported(tmp_path, tok):
    with pytest.raises(ValueError, match="do not belong together"): export_base(small(vocab_size=200), tok, tmp_path/"a")
    assert not (tmp_path/"a").exists()

def test_a_wrapped_model_is_exported_as_the_model(tmp_path, tok):
    model = with_lora(small())
    for wrap, where in ((lambda m: m, "plain"), (torch.compile, "wrapped")):
        export_base(wrap(model), tok, tmp_path/where); export_adapter(wrap(model), tmp_path/where/"adapter")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/tiny_llm.json"):
        assert (tmp_path/"plain"/name).read_bytes() == (tmp_path/"wrapped"/name).read_bytes()
    model.norm_f.weight.data.mul_(2)
    with pytest.raises(ValueError, match="changed since"): export_adapter(model, tmp_path/"new")

@pytest.mark.parametrize("kind", ["T5", "Whisper"])
def test_an_adapter_of_an_encoder_decoder_opens_in_peft(tmp_path, kind):
    how = dict(T5=dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2),
               Whisper=dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                            decoder_ffn_dim=24, max_source_positions=8, num_mel_bins=4, pad_token_id=0, bos_token_id=1, eos_token_id=2))[kind]
    def make():
        torch.manual_seed(0)
        return getattr(transformers, kind + "ForConditionalGeneration")(getattr(transformers, kind + "Config")(vocab_size=60, decoder_start_token_id=0, **how)).eval()
    ids = torch.arange(9)[None]; x = dict(decoder_input_ids=ids, **({"input_ids": ids} if kind == "T5" else {"input_features": torch.randn(1, 4, 16)}))
    model = with_lora(make(), targets=["q", "v"] if kind == "T5" else ["q_proj", "v_proj"])
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path/"adapter_config.json").read_text())["task_type"] is None
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()(**x).logits
        assert_close(theirs, model(**x).logits, **TIGHT); assert (theirs - make()(**x).logits).abs().max() > 1e-4

def test_an_untied_head_is_adapted(tmp_path, tok):
    expected, folder = pefts(tmp_path, tok, small(tie_weights=False), target_modules=["lm_head"])
    assert_close(logits(import_adapter(small(tie_weights=False), folder)), expected, **TIGHT)

def test_states_in_which_nothing_is_imported_or_exported(tmp_path):
    export_adapter(with_lora(small()), tmp_path)
    with pytest.raises(ValueError, match="already"): import_adapter(with_lora(small()), tmp_path)
    merged = merge_lora(with_lora(small()))
    for f in (import_adapter, export_adapter):
        with pytest.raises(ValueError, match="merged"): f(merged, tmp_path)
    with pytest.raises(ValueError, match="no LoRA"): export_adapter(small(), tmp_path/"new")
    with pytest.raises(FileNotFoundError): import_adapter(small(), tmp_path/"none")
    assert not (tmp_path/"new").exists()

def test_our_own_adapter_is_no_adapter_for_the_llama(tmp_path):
    save_adapter(with_lora(small()), tmp_path)
    with pytest.raises(BadFileError, match="another base"): import_adapter(small(), tmp_path)
    (tmp_path/"tiny_llm.json").unlink()
    with pytest.raises(BadFileError, match="self_attn.q_proj"): import_adapter(small(), tmp_path)

@pytest.mark.parametrize("ranks", [r for r in itertools.product((None, 1, 3), repeat=3) if any(r)])
@pytest.mark.parametrize("scalings", [(2.0, 2.0, 2.0), (2.0, 0.5, 3.0)])
def test_fuse(ranks, scalings):
    torch.manual_seed(0)
    parts = [r and (torch.randn(r, 10).double(), torch.randn(6, r).double(), s) for r, s in zip(ranks, scalings)]
    A, B, scaling = fuse(parts, 6)
    expected = torch.cat([p[2] * p[1] @ p[0] if p else torch.zeros(6, 10).double() for p in parts])
    assert len(A) == sum(r or 0 for r in ranks)
    assert_close(scaling * B @ A, expected, **TOLERANCE[torch.float64])

def test_the_shipped_adapters_in_peft(tmp_path):
    base, tok = load_base(device="cpu")
    ids = torch.tensor([tok.encode(bundled_stories()[0]["story"])[:60]])
    for name in ("instruct", "moral"):
        model = load_adapter(copy.deepcopy(base), ASSETS/"adapters"/name)
        export_adapter(model, tmp_path/name)
        theirs = peft.PeftModel.from_pretrained(llama_of(base, tok, tmp_path/"base"), tmp_path/name).eval()
        with torch.no_grad(): assert_close(theirs(ids).logits, model(ids), **TOLERANCE[torch.float32])
