"Configurations from other versions and other methods: what cannot matter is warned of, what would change the numbers is refused by name."
import peft, pytest, torch
from tiny_llm.adapter import BASE_UNCHANGED, UNSUPPORTED, load_adapter, save_adapter
from tiny_llm.files import BadFileError
from .peers import CONFIGS, MODELS, base, cases, edit, far, from_peft, logits, ours, pair, plain, same_state, state

HOW = CONFIGS["two"](*MODELS["llama"][1])

@pytest.fixture
def folder(tmp_path):
    "An adapter that PEFT wrote."
    pair("llama", **HOW)[1].save_pretrained(tmp_path)
    return tmp_path

def refused(folder, why, name="llama"):
    model = base(name); before = state(model)
    with pytest.raises(BadFileError, match=why): load_adapter(model, folder)
    assert same_state(model.state_dict(), before)

@cases(configs=["patterns"])
def test_a_newer_version(name, how, tmp_path):
    mine = ours(name, **how); save_adapter(mine, tmp_path); edit(tmp_path, foobar="baz", spam=123)
    with pytest.warns(UserWarning, match="foobar.*spam"): again = load_adapter(base(name), tmp_path)
    with pytest.warns(UserWarning, match="foobar.*spam"): other = peft.PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert torch.equal(logits(again), logits(mine)) and torch.equal(logits(again), logits(other)) and far(logits(again), plain(name))

@cases(configs=["rslora"])
def test_our_note_does_not_mind_a_newer_version(name, how, tmp_path):
    mine = ours(name, **how); save_adapter(mine, tmp_path); note = (tmp_path/"tiny_llm.json").read_text()
    edit(tmp_path, foobar=None); (tmp_path/"tiny_llm.json").write_text(note)
    with pytest.warns(UserWarning, match="foobar"): assert torch.equal(logits(load_adapter(base(name), tmp_path)), logits(mine))

def test_copies_of_the_base_are_refused(tmp_path):
    "PEFT adds the head's own weight to the file where the head is a target, unless told otherwise."
    other = pair("llama-gqa", r=2, targets=["lm_head"])[1]
    with pytest.warns(UserWarning, match="save_embedding_layers"): other.save_pretrained(tmp_path)
    refused(tmp_path, "lm_head.base_layer.weight", "llama-gqa")

def test_an_unknown_switch_is_refused(folder): refused(edit(folder, use_magic=True), "use_magic")

VALUES = dict(alora_invocation_tokens=[1, 2], arrow_config={"top_k": 3}, bias="all", kasa_config={"beta": 0.1}, layer_replication=[[0, 2], [1, 2]],
              megatron_config={"x": 1}, modules_to_save=["norm"], monteclora_config={"num_samples": 2}, target_parameters=["q_proj.weight"],
              trainable_token_indices=[1])

@pytest.mark.parametrize("option", UNSUPPORTED)
def test_what_changes_the_numbers_is_refused(folder, option): refused(edit(folder, **{option: VALUES.get(option, True)}), option)

def test_every_option_of_peft_is_known():
    "What PEFT can be told is written as it is here, or refused, or in one of these, which say nothing about a saved plain LoRA."
    told = set(peft.LoraConfig.__dataclass_fields__) - {"runtime_config"}
    used = {"r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "layers_to_transform",
            "layers_pattern", "peft_type", "init_lora_weights", "fan_in_fan_out"}
    start = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"} # how A and B, or the base, began: judged by init_lora_weights
    about = {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"}
    assert told - used - start - about - set(UNSUPPORTED) == {"velora_config"} # VeLoRA saves memory in training; the numbers are plain LoRA's

@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica", "something new"])
def test_a_start_that_moves_the_base_is_refused(folder, init): refused(edit(folder, init_lora_weights=init), f"init_lora_weights='{init}'")

@pytest.mark.parametrize("init", BASE_UNCHANGED)
def test_a_start_that_leaves_the_base_is_read(folder, init):
    expected = logits(from_peft("llama", folder))
    assert torch.equal(logits(load_adapter(base("llama"), edit(folder, init_lora_weights=init))), expected)

@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_own_folders_with_a_moved_base_are_refused(init, tmp_path):
    model = peft.get_peft_model(base("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    model.save_pretrained(tmp_path); refused(tmp_path, init)

@pytest.mark.parametrize("option", [dict(use_dora=True), dict(bias="lora_only"), dict(modules_to_save=["norm"]), dict(trainable_token_indices=[1])], ids=lambda o: next(iter(o)))
def test_pefts_own_folders_with_more_than_lora_are_refused(option, tmp_path):
    model = peft.get_peft_model(base("llama-gqa"), peft.LoraConfig(r=4, target_modules=["q_proj"], **option))
    model.save_pretrained(tmp_path); refused(tmp_path, next(iter(option)), "llama-gqa")

@pytest.mark.parametrize("config", [peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), peft.LoHaConfig(r=2, target_modules=["q_proj"]),
                                    peft.VeraConfig(r=4, target_modules=["q_proj"]), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")], ids=lambda c: c.peft_type.value)
def test_other_methods_are_refused_by_name(config, tmp_path):
    peft.get_peft_model(base("llama"), config).save_pretrained(tmp_path); refused(tmp_path, config.peft_type.value)
