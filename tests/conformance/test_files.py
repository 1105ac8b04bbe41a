"Files in both directions: what is saved here loads in PEFT, what PEFT saves loads here, with equal logits."
import peft, pytest, torch
from tiny_llm.adapter import adapter_config, load_adapter, save_adapter
from tiny_llm.lora import lora_modules, lora_parameters
from .peers import HF, MODELS, SOME, WEIGHTS, base, cases, far, from_peft, logits, ours, pair, peft_layers, plain, train

@cases(configs=[*SOME, "patterns"])
def test_ours_in_peft(name, how, tmp_path):
    mine = ours(name, **how); save_adapter(mine, tmp_path)
    other = from_peft(name, tmp_path)
    assert torch.equal(logits(mine), logits(other)) and far(logits(mine), plain(name))
    for n, m in lora_modules(mine).items():
        layer = peft_layers(other)[n]
        assert torch.equal(m.A, layer.lora_A.default.weight) and torch.equal(m.B, layer.lora_B.default.weight)
        assert (m.r, m.scaling) == (layer.r["default"], layer.scaling["default"])

@cases(configs=[*SOME, "patterns"])
def test_pefts_here(name, how, tmp_path):
    mine, other = pair(name, **how)
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    again = load_adapter(base(name), tmp_path)
    assert torch.equal(logits(again), logits(other)) and {n: (m.r, m.scaling) for n, m in lora_modules(again).items()} == {n: (m.r, m.scaling) for n, m in lora_modules(mine).items()}
    assert adapter_config(again) == adapter_config(mine)

@cases(configs=["patterns", "rslora patterns", "regex"])
def test_there_and_back(name, how, tmp_path):
    mine = ours(name, **how); save_adapter(mine, tmp_path/"ours")
    from_peft(name, tmp_path/"ours").save_pretrained(tmp_path/"peft", save_embedding_layers=False)
    again = load_adapter(base(name), tmp_path/"peft"); save_adapter(again, tmp_path/"again")
    assert torch.equal(logits(again), logits(mine)) and adapter_config(again) == adapter_config(mine)
    assert len({(tmp_path/f/WEIGHTS).read_bytes() for f in ("ours", "peft", "again")}) == 1

WRITTEN = { # what only a file says, in PEFT's words
    "layers_to_transform": lambda a, b: dict(target_modules=[a, b], layers_to_transform=[1]),
    "one layer": lambda a, b: dict(target_modules=[a, b], layers_to_transform=0),
    "layers_pattern": lambda a, b: dict(target_modules=[a], layers_to_transform=[1], layers_pattern=["blocks", "layers", "h"]),
    "regex": lambda a, b: dict(target_modules=rf".*\.[01]\..*({a}|{b})"),
    "exclude regex": lambda a, b: dict(target_modules=[a, b], exclude_modules=r".*\.0\..*"),
    "rank of one layer": lambda a, b: dict(target_modules=[a], rank_pattern={rf".*\.1\..*{a}": 2}, alpha_pattern={rf"^(?!.*\.1\.).*{a}$": 3}),
}

@pytest.mark.parametrize("name, what", [(n, w) for n in MODELS for w in WRITTEN if n in HF or n == "gpt" and w not in ("layers_to_transform", "one layer")])
def test_what_only_peft_writes(name, what, tmp_path):
    model = base(name)
    other = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, fan_in_fan_out=name == "gpt2", **WRITTEN[what](*MODELS[name][1]))).eval()
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    mine = load_adapter(base(name), tmp_path)
    assert list(lora_modules(mine)) == other.targeted_module_names
    assert torch.equal(logits(mine), logits(other)) and far(logits(mine), plain(name))

@cases(HF, ["two", "rslora patterns", "dropout"])
def test_trained_here_loads_in_peft(name, how, tmp_path):
    mine = ours(name, **how); start = logits(mine)
    train(mine.train(), lora_parameters(mine)); save_adapter(mine.eval(), tmp_path)
    assert torch.equal(logits(mine), logits(from_peft(name, tmp_path))) and far(logits(mine), start)
