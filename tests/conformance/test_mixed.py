"Several ranks and alphas in one model, several adapters on one base, and several adapters in one batch."
import peft, pytest, torch, torch.nn as nn
from torch.testing import assert_close
from tiny_llm.adapter import load_adapter, save_adapter, swap_adapter
from tiny_llm.lora import add_lora_to_model, lora_modules
from .peers import HF, IDS, MODELS, TIGHT, base, far, from_peft, logits, ours, peft_layers

class Nest(nn.Module):
    "Layers whose names end alike, three deep: foo, bar, module.foo, module.module.foo, …"
    def __init__(self, depth=3):
        super().__init__()
        self.foo, self.bar = nn.Linear(8, 8), nn.Linear(8, 8)
        if depth > 1: self.module = Nest(depth - 1)

PATTERNS = ["foo", "^foo", "module.foo", "^module.foo", "^module.module.foo", r"module\.(foo|bar)", ".*"]

@pytest.mark.parametrize("first", PATTERNS)
@pytest.mark.parametrize("second", PATTERNS)
def test_patterns_mean_the_same_layers(first, second):
    "Also where two keys fit one layer: the first counts."
    ranks, alphas = {first: 2, second: 3}, {second: 5, first: 7}
    other = peft.get_peft_model(Nest(), peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", rank_pattern=ranks, alpha_pattern=alphas))
    mine = add_lora_to_model(Nest(), 8, 16, "all-linear", rank_pattern=ranks, alpha_pattern=alphas)
    assert {n: (m.r, m.scaling) for n, m in lora_modules(mine).items()} == {n: (m.r["default"], m.scaling["default"]) for n, m in peft_layers(other).items()}

def two_adapters(name, tmp_path):
    "Folders of two adapters of another rank, alpha and layers."
    a, b = MODELS[name][1]
    save_adapter(ours(name, r=2, alpha=8, targets=[a, b]), tmp_path/"one"); save_adapter(ours(name, seed=1, r=5, alpha=4, targets=[b], use_rslora=True), tmp_path/"two")
    other = from_peft(name, tmp_path/"one"); other.load_adapter(tmp_path/"two", "two")
    return tmp_path/"one", tmp_path/"two", other.eval()

@pytest.mark.parametrize("name", MODELS)
def test_swapping_is_set_adapter(name, tmp_path):
    one, two, other = two_adapters(name, tmp_path)
    mine, said = load_adapter(base(name), one), []
    for folder, adapter in ((one, "default"), (two, "two"), (one, "default")):
        swap_adapter(mine, folder); other.set_adapter(adapter)
        said.append(logits(mine)); assert torch.equal(said[-1], logits(other))
    assert far(said[0], said[1]) and torch.equal(said[0], said[2])

@pytest.mark.parametrize("name", [*HF, "mlp"])
def test_a_batch_of_several_adapters_is_ours_row_by_row(name, tmp_path):
    one, two, other = two_adapters(name, tmp_path)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(2)) if name == "mlp" else IDS[[0, 1, 2, 0]]
    who = ["__base__", "default", "two", "two"]
    with torch.no_grad(): out = other(x, adapter_names=who)
    mixed, mine = getattr(out, "logits", out), load_adapter(base(name), one)
    rows = {"__base__": logits(base(name), x), "default": logits(mine, x), "two": logits(swap_adapter(mine, two), x)}
    assert far(rows["__base__"], rows["two"]) and far(rows["default"], rows["two"])
    assert_close(mixed, torch.stack([rows[w][i] for i, w in enumerate(who)]), **TIGHT)
