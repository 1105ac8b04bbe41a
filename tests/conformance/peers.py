"Models, configurations and pairs of models: one base with the same A and B, once adapted here and once in PEFT, the oracle."
import copy, functools, json, re, warnings
from collections import OrderedDict
from hypothesis import HealthCheck, settings
import peft, pytest, torch, torch.nn as nn, transformers as hf
from tiny_llm.gpt import GPT, GPTConfig
from tiny_llm.lora import add_lora_to_model, is_conv1d, lora_modules, lora_parameters

TIGHT = dict(atol=1e-6, rtol=1e-6) # what PEFT's own tests ask of fp32
REPEATABLE = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)) # for hypothesis
WEIGHTS, CONFIG, NOTE = "adapter_model.safetensors", "adapter_config.json", "tiny_llm.json"

# Models: all tiny, all weights and biases random, so that no bias is 0 and no norm is 1

LLAMA = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
             use_cache=False, bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, use_cache=False, bos_token_id=1, eos_token_id=2)

def _gpt(**how): return GPT(GPTConfig(vocab_size=64, max_seq_len=32, d_model=32, n_heads=4, n_layers=2, d_mlp=48, **how))

def _mlp(): return nn.Sequential(OrderedDict(lin0=nn.Linear(12, 24), act0=nn.ReLU(), drop=nn.Dropout(0.2), lin1=nn.Linear(24, 24), act1=nn.ReLU(), lin2=nn.Linear(24, 8)))

MODELS = { # name: (how it is made, two of its targets)
    "gpt": (_gpt, ("attn.qkv", "mlp.down")),
    "gpt-untied": (lambda: _gpt(tie_weights=False), ("attn.W_o", "lm_head")),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)), ("q_proj", "v_proj")),
    "llama-gqa": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=False)), ("k_proj", "lm_head")),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), ("c_attn", "c_fc")),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA, num_key_value_heads=2)), ("v_proj", "down_proj")),
    "neox": (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**LLAMA)), ("query_key_value", "dense_4h_to_h")),
    "mlp": (_mlp, ("lin0", "lin2")),
}
HF = ["llama", "llama-gqa", "gpt2", "qwen2", "neox"]

@functools.cache
def _made(name):
    model, g = MODELS[name][0](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(noise * 0.06 if p.ndim > 1 else p + noise * 0.1)
    return model.eval()

def base(name): return copy.deepcopy(_made(name)).requires_grad_(True)

# Configurations, in this book's words

CONFIGS = { # from two targets to the arguments of `add_lora_to_model`
    "two": lambda a, b: dict(r=4, alpha=8, targets=[a, b]),
    "rank 1": lambda a, b: dict(r=1, alpha=1, targets=[b, a], exclude=[b]),
    "rslora": lambda a, b: dict(r=8, alpha=16, targets=[a], use_rslora=True),
    "dropout": lambda a, b: dict(r=3, alpha=6.5, targets="all-linear", dropout=0.3),
    "patterns": lambda a, b: dict(r=4, alpha=8, targets=[a, b], rank_pattern={a: 2}, alpha_pattern={b: 3}),
    "rslora patterns": lambda a, b: dict(r=2, alpha=8, targets=[b, a], use_rslora=True, rank_pattern={b: 6}, alpha_pattern={f"{a}|nothing": 5}),
    "regex": lambda a, b: dict(r=5, alpha=4, targets=re.compile(rf"\.1\..*({a}|{b})$|lin1$")),
}
SOME = ["two", "dropout", "rslora patterns", "regex"]

def cases(models=MODELS, configs=CONFIGS):
    "One case for each model and configuration: a decorator for tests that take `name` and `how`."
    return pytest.mark.parametrize("name, how", [pytest.param(n, CONFIGS[c](*MODELS[n][1]), id=f"{n}-{c}") for n in models for c in configs])

def spelled(targets):
    "Targets as PEFT writes them: a regular expression there is for the whole name."
    return f".*({targets.pattern}).*" if isinstance(targets, re.Pattern) else targets if isinstance(targets, str) else list(targets) or None

def peft_config(model, r=8, alpha=16, targets=(), dropout=0.0, use_rslora=False, exclude=(), rank_pattern=None, alpha_pattern=None, **more):
    "The same configuration in PEFT's words. PEFT knows the head of Hugging Face's models only, so for our GPT it is excluded here."
    out = ["lm_head"] if isinstance(model, GPT) and targets == "all-linear" else []
    return peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=spelled(targets), lora_dropout=dropout, use_rslora=use_rslora,
                           exclude_modules=spelled([*exclude, *out]), rank_pattern=rank_pattern or {}, alpha_pattern=alpha_pattern or {},
                           fan_in_fan_out=any(map(is_conv1d, model.modules())), **more)

# Pairs

def randomized(model, seed=0):
    "Random A and B, so that the adapter does something."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_parameters(model): p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return model

def ours(name, seed=0, **how): return randomized(add_lora_to_model(base(name), **how), seed).eval()

def peft_layers(model):
    "name -> PEFT's LoRA layer, in the model's order, under the name that it has without PEFT."
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}

def share(mine, other, adapter="default"):
    "Copy A and B into the PEFT model; both have the same layers, or this fails."
    layers, theirs = lora_modules(mine), peft_layers(other)
    assert layers and layers.keys() == {n for n, m in theirs.items() if adapter in m.lora_A}
    with torch.no_grad():
        for n, m in layers.items(): theirs[n].lora_A[adapter].weight.copy_(m.A), theirs[n].lora_B[adapter].weight.copy_(m.B)
    return other

def theirs(name, mine, **how):
    "The base in PEFT, with the numbers of our model."
    model = base(name)
    return share(mine, peft.get_peft_model(model, peft_config(model, **how))).eval()

def pair(name, **how):
    model = ours(name, **how)
    return model, theirs(name, model, **how)

# What a model says

IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))

def run(model, x=None):
    "Logits with their graph."
    x = x if x is not None else IDS if any(isinstance(m, nn.Embedding) for m in model.modules()) else X
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits

@torch.no_grad()
def logits(model, x=None): return run(model, x)

@functools.cache
def plain(name): return logits(base(name))

def far(a, b): return (a - b).abs().max() > 1e-3

def loss(model, x=None): return (run(model, x) ** 2).mean()

def train(model, params, steps=3, lr=0.05):
    "Real optimizer steps; the losses."
    opt, losses = torch.optim.AdamW(params, lr=lr), []
    for _ in range(steps):
        losses.append(loss(model)); losses[-1].backward()
        opt.step(); opt.zero_grad()
    return torch.stack(losses).detach()

def state(model): return {k: v.clone() for k, v in model.state_dict().items()}

def same_state(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

# Files

def from_peft(name, folder):
    "The base with the adapter of a folder, as PEFT loads it; any warning about it is an error."
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(base(name), folder).eval()

def edit(folder, **fields):
    "Change fields of a configuration. Without our note, so that what is tested is not the note."
    (folder/NOTE).unlink(missing_ok=True)
    (folder/CONFIG).write_text(json.dumps({**json.loads((folder/CONFIG).read_text()), **fields}))
    return folder
