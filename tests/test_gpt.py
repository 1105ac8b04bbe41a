"The GPT against its oracle, `transformers`' Llama, and its files."
import dataclasses, os
import pytest, torch
from torch.testing import assert_close
from tiny_llm.adapter import merge_lora
from tiny_llm.files import BadFileError
from tiny_llm.gpt import GPT, GPTConfig, fingerprint, load_checkpoint, new_cache, save_checkpoint
from tiny_llm.lora import add_lora_to_model

SMALL = GPTConfig(vocab_size=97, max_seq_len=64, d_model=32, n_heads=4, n_layers=2, d_mlp=48)

def as_llama(model):
    "The same weights in `transformers`' LlamaForCausalLM: fused qkv split, everything else renamed."
    transformers = pytest.importorskip("transformers")
    c = model.config
    cfg = transformers.LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_mlp, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_weights,
        attention_bias=False, mlp_bias=False, rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta))
    llama = transformers.LlamaForCausalLM(cfg).eval()
    state = {"model.embed_tokens.weight": model.tok_emb.weight, "model.norm.weight": model.norm_f.weight, "lm_head.weight": model.lm_head.weight}
    for i, b in enumerate(model.blocks):
        p = f"model.layers.{i}."
        state |= {f"{p}self_attn.{n}_proj.weight": w for n, w in zip("qkv", b.attn.qkv.weight.chunk(3))}
        state |= {f"{p}self_attn.o_proj.weight": b.attn.W_o.weight, f"{p}input_layernorm.weight": b.norm1.weight,
                  f"{p}post_attention_layernorm.weight": b.norm2.weight}
        state |= {f"{p}mlp.{n}_proj.weight": getattr(b.mlp, n).weight for n in ("gate", "up", "down")}
    llama.load_state_dict(state, strict=True)
    return llama

@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, tie_weights=False), dataclasses.replace(SMALL, rope_theta=500.0, norm_eps=1e-6), GPTConfig()],
                         ids=["tied", "untied", "other constants", "shipped shape"])
def test_logits_equal_llama(config):
    torch.manual_seed(0)
    model = GPT(config).eval()
    for n, p in model.named_parameters():
        if "norm" in n: p.normal_(1, 0.2)
        else: p.mul_(5) # larger weights make attention sharp, so that a wrong position shows
    ids = torch.randint(0, config.vocab_size, (3, 50))
    ours = model(ids)
    assert ours.std() > 0.1
    assert_close(ours, as_llama(model)(ids).logits, atol=1e-4, rtol=1e-4)

@torch.no_grad()
def test_shipped_base_equals_llama():
    from tiny_llm.generate import load_base
    model, tok = load_base(device="cpu")
    ids = torch.tensor([[tok.eot] + tok.encode("Once upon a time, there was a small boat that wanted to see the sea.")])
    assert_close(model(ids), as_llama(model)(ids).logits, atol=1e-4, rtol=1e-4)

def test_7b_shape():
    with torch.device("meta"): assert sum(p.numel() for p in GPT(GPTConfig.llama_7b()).parameters()) == 6_738_415_616

def test_init_std():
    model = GPT(GPTConfig())
    for p in (model.tok_emb.weight, model.blocks[3].mlp.down.weight): assert abs(p.std().item() - 0.02) < 5e-4

@torch.no_grad()
def test_cache_with_padding_equals_full():
    model = GPT(SMALL).eval()
    ids, mask = torch.randint(0, 97, (2, 10)), torch.ones(2, 10).bool()
    mask[0, :4] = False
    cache = new_cache(model)
    parts = [model(ids[:, :6], mask[:, :6], cache), model(ids[:, 6:9], mask[:, :9], cache), model(ids[:, 9:], mask, cache)]
    assert_close(torch.cat(parts, 1)[mask], model(ids, mask)[mask], atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("bad", [dict(d_model=30), dict(d_model=12, n_heads=4)])
def test_bad_config(bad):
    with pytest.raises(ValueError, match="multiple|even"): GPTConfig(**bad)

def test_too_long():
    with pytest.raises(ValueError, match="max_seq_len=64"): GPT(SMALL)(torch.zeros(1, 65, dtype=torch.long))

@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, tied):
    model = GPT(dataclasses.replace(SMALL, tie_weights=tied))
    save_checkpoint(model, tmp_path/"m.safetensors", note="x")
    again = load_checkpoint(tmp_path/"m.safetensors")
    assert fingerprint(again) == fingerprint(model) and again.config == model.config
    assert (again.lm_head.weight is again.tok_emb.weight) == tied

def test_pt_layout(tmp_path):
    model = GPT(SMALL)
    torch.save({"model": model.state_dict(), "gpt_config": model.config}, tmp_path/"m.pt")
    assert fingerprint(load_checkpoint(tmp_path/"m.pt")) == fingerprint(model)

def damage(path, how):
    "Write a damaged or foreign version of a good checkpoint."
    whole = path.read_bytes()
    if how == "truncated": path.write_bytes(whole[:-100])
    elif how == "empty": path.write_bytes(b"")
    elif how == "text": path.write_text("Once upon a time")
    elif how == "huge header": path.write_bytes(b"\xff" * 8 + whole[8:])
    else:
        from safetensors.torch import load_file, save_file
        state, meta = load_file(path), {"gpt_config": '{"d_model": 32}'}
        save_file(state, path, metadata=None if how == "no config" else {"gpt_config": "[]"} if how == "config list" else {"gpt_config": '{"width": 3}'} if how == "unknown field" else meta)

@pytest.mark.parametrize("how", ["truncated", "empty", "text", "huge header", "no config", "config list", "unknown field", "mismatched"])
def test_bad_files(tmp_path, how):
    save_checkpoint(GPT(SMALL), tmp_path/"m.safetensors")
    damage(tmp_path/"m.safetensors", how)
    with pytest.raises(BadFileError, match="m.safetensors"): load_checkpoint(tmp_path/"m.safetensors")

def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError): load_checkpoint(tmp_path/"none.safetensors")

def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    import tiny_llm.gpt as gpt
    model = GPT(SMALL)
    save_checkpoint(model, tmp_path/"m.safetensors")
    old = (tmp_path/"m.safetensors").read_bytes()
    def half(tensors, path, metadata): open(path, "wb").write(old[:50]); raise OSError("no space left")
    monkeypatch.setattr(gpt, "save_file", half)
    with pytest.raises(OSError): save_checkpoint(GPT(SMALL), tmp_path/"m.safetensors")
    assert (tmp_path/"m.safetensors").read_bytes() == old and len(list(tmp_path.iterdir())) == 1

# What is saved can be loaded

def untied(model): model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1); return model
def other_shape(model): model.config.n_layers = 3; return model
def inner(model): model.blocks[0] = torch.compile(model.blocks[0]); return model

@pytest.mark.parametrize("spoil, says", [(lambda m: add_lora_to_model(m, r=2), "save_adapter, or merge_lora first"), (lambda m: torch.nn.Linear(2, 2), "Linear is no GPT"),
    (untied, "ties"), (other_shape, "could not be loaded again: missing"), (inner, "could not be loaded again: missing")], ids=["adapters", "no GPT", "untied", "shape", "a compiled part"])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, spoil, says):
    "Field case 14, and its kind."
    with pytest.raises(ValueError, match=says): save_checkpoint(spoil(GPT(dataclasses.replace(SMALL))), tmp_path/"m.safetensors")
    for path, how in (("m.pt", {}), ("m.safetensors", dict(dtype=torch.int8))):
        with pytest.raises(ValueError, match="safetensors|floating"): save_checkpoint(GPT(SMALL), tmp_path/path, **how)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, lambda m: merge_lora(add_lora_to_model(m, r=2))], ids=["compiled", "parallel", "merged"])
def test_a_wrapped_model_is_saved_as_itself(tmp_path, wrap):
    model = GPT(SMALL)
    save_checkpoint(wrap(model), tmp_path/"m.safetensors", gpt_config="not this")
    assert fingerprint(load_checkpoint(tmp_path/"m.safetensors")) == fingerprint(model)

def test_more_blocks_than_tensors_are_not_built(tmp_path):
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(1)}, tmp_path/"m.safetensors", metadata={"gpt_config": '{"n_layers": 1048576}'})
    with pytest.raises(BadFileError, match="cannot fill 1048576 blocks"): load_checkpoint(tmp_path/"m.safetensors")

def test_everybody_may_read_what_the_umask_allows_and_who_may_not_is_told(tmp_path):
    "Field case 19."
    old = os.umask(0o022)
    try: save_checkpoint(GPT(SMALL), tmp_path/"m.safetensors")
    finally: os.umask(old)
    assert (tmp_path/"m.safetensors").stat().st_mode & 0o777 == 0o644
    if os.geteuid(): (tmp_path/"m.safetensors").chmod(0)
    else: # root may read everything: be somebody else
        (tmp_path/"m.safetensors").chmod(0o600); [p.chmod(0o755) for p in (tmp_path, tmp_path.parent, tmp_path.parent.parent)]; os.seteuid(65534)
    try:
        with pytest.raises(PermissionError): load_checkpoint(tmp_path/"m.safetensors")
    finally:
        if not os.getuid(): os.seteuid(0)
