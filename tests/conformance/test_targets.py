"The same layers as PEFT selects: by suffix, list, regular expression, all-linear, exclusion, block numbers and their patterns."
import re, warnings
import peft, pytest, torch.nn as nn
from hypothesis import Phase, given, settings, strategies as st
from tiny_llm.adapter import load_adapter
from tiny_llm.lora import lora_modules, match_targets
from .peers import HF, MODELS, REPEATABLE, base, peft_config, spelled

A_AND_B = {n: t for n, (_, t) in MODELS.items()}
ASKED = { # in our words: (targets, exclude)
    "one suffix": lambda a, b: ([a], ()),
    "two": lambda a, b: ([b, a], ()),
    "whole names": lambda a, b: (None, ()), # filled in below: the first and the last layer
    "all-linear": lambda a, b: ("all-linear", ()),
    "all but one": lambda a, b: ("all-linear", [a]),
    "regex": lambda a, b: (re.compile(rf"({a}|{b})$"), ()),
    "regex, one block": lambda a, b: (re.compile(rf"\b0\b.*{a}|{a}$"), ()),
    "exclude a regex": lambda a, b: ([a, b], re.compile(rf"^((?!{b}).)*$")),
}

@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", MODELS)
def test_same_layers(name, asked):
    targets, exclude = ASKED[asked](*A_AND_B[name])
    if targets is None: targets = [(every := match_targets(base(name), "all-linear"))[0], every[-1]]
    config = peft_config(base(name), targets=targets)
    if exclude and isinstance(exclude, re.Pattern): config.exclude_modules = spelled(exclude)
    elif exclude: config.exclude_modules = {*exclude, *(config.exclude_modules or ())}
    assert match_targets(base(name), targets, exclude) == peft.get_peft_model(base(name), config).targeted_module_names

# What only a file can say: PEFT writes it, we read it

def tree(*names):
    "A model with a linear layer at each of these paths."
    root = nn.Module()
    for name in names:
        at, *path = root, *name.split(".")
        for part in path[:-1]:
            if part not in at._modules: at.add_module(part, nn.Module())
            at = at._modules[part]
        at.add_module(path[-1], nn.Linear(4, 4, bias=False))
    return root

def select(names, tmp_path, **config):
    "(what PEFT selects among these names, what we read from the folder that it writes)."
    other = peft.get_peft_model(tree(*names), peft.LoraConfig(r=2, **config))
    other.save_pretrained(tmp_path)
    return other.targeted_module_names, list(lora_modules(load_adapter(tree(*names), tmp_path)))

BLOCKS = { # of Hugging Face's models
    "a list": dict(layers_to_transform=[0]), "a number": dict(layers_to_transform=1), "all": dict(layers_to_transform=[0, 1]), "none": dict(layers_to_transform=[]),
    "with a pattern": dict(layers_to_transform=[1], layers_pattern="[a-z]+"), "with patterns": dict(layers_to_transform=[0], layers_pattern=["layers", "h"]),
    "an empty pattern": dict(layers_to_transform=[1], layers_pattern=[]),
}

@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", HF)
def test_blocks(name, blocks, tmp_path):
    targets = [t for t in A_AND_B[name] if t != "lm_head"]
    other = peft.get_peft_model(base(name), peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2", **BLOCKS[blocks]))
    other.save_pretrained(tmp_path)
    assert list(lora_modules(load_adapter(base(name), tmp_path))) == other.targeted_module_names

EXPERTS = [f"model.layers.{i}.{n}" for i in range(3) for n in ("attn.q_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")]

@pytest.mark.parametrize("pattern", ["layers", ["h", "layers"], "experts", None, ["experts", "layers"]])
def test_a_block_number_is_not_an_experts_number(pattern, tmp_path):
    peft_names, names = select(EXPERTS, tmp_path, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern=pattern)
    assert names == peft_names

NAMES = { # (names, configuration)
    "an end that is part of another": (["foo", "barfoo", "m.foo", "m.barfoo", "m.foo.x"], dict(target_modules=["foo"])),
    "a path as suffix": (["a.b.c", "x.b.c", "xb.c", "a.c"], dict(target_modules=["b.c"])),
    "a regular expression is for the whole name": (["foo", "foobar", "m.foo"], dict(target_modules="foo.*")),
    "exclude by suffix": (["m.0.q", "m.0.k", "m.1.q"], dict(target_modules=["q", "k"], exclude_modules=["0.q"])),
    "exclude by regex": (["m.0.q", "m.0.k", "m.1.q"], dict(target_modules="all-linear", exclude_modules=r"m\.\d\.k")),
    "a whole name needs no block number": (["m.h.0.q", "m.h.1.q", "q"], dict(target_modules=["q"], layers_to_transform=[1])),
    "blocks at the top": (["h.0.q", "h.1.q", "m.h.0.q", "m.h.1.q"], dict(target_modules=["q"], layers_to_transform=[1], layers_pattern="h")),
    "blocks at the top without a pattern": (["h.0.q", "h.1.q", "m.h.0.q", "m.h.1.q"], dict(target_modules=["q"], layers_to_transform=[1])),
    "a number with zeros": (["m.h.01.q", "m.h.1.q", "m.h.11.q"], dict(target_modules=["q"], layers_to_transform=[1])),
    "two numbers": (["m.h.1.g.2.q", "m.h.2.g.1.q"], dict(target_modules=["q"], layers_to_transform=[1])),
    "a block of the same name inside": (["h.0.h.1.q", "h.1.h.0.q", "m.h.1.h.0.q"], dict(target_modules=["q"], layers_to_transform=[1], layers_pattern="h")),
    "many targets": ([f"m.{i}.{n}" for i in range(30) for n in "qk"], dict(target_modules=[f"m.{i}.q" for i in range(25)])),
}

@pytest.mark.parametrize("what", NAMES)
def test_names(what, tmp_path):
    names, config = NAMES[what]
    peft_names, mine = select(names, tmp_path, **config)
    assert mine == peft_names

PART, LEAF = st.sampled_from(["m", "h.0", "h.1", "layers.1", "layers.2", "experts.0", "experts.1"]), st.sampled_from(["q", "up"])
PATHS = st.sets(st.tuples(st.lists(PART, max_size=3), LEAF).map(lambda p: ".".join([*p[0], p[1]])), min_size=1, max_size=8)
BY_NUMBER = st.sampled_from([None, 1, [0, 2]])

def test_any_names(tmp_path_factory):
    @settings(REPEATABLE, max_examples=100, phases=[Phase.generate])
    @given(PATHS, st.sets(st.sampled_from(["q", "up", "0.q", "h.1.q"]), min_size=1), st.sampled_from([None, ["up"], r".*\.0\..*"]), BY_NUMBER, st.sampled_from([None, "h", ["layers", "h"]]))
    def check(paths, targets, exclude, blocks, pattern):
        names = sorted(paths)
        config = dict(target_modules=sorted(targets), exclude_modules=exclude, layers_to_transform=blocks, layers_pattern=pattern if blocks is not None else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: peft_names, mine = select(names, tmp_path_factory.mktemp("names"), **config)
            except peft.utils.error.NoMatchingPeftModuleError: return
        assert mine == peft_names
    check()
