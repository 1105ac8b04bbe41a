"What stands in the files: the exact names, shapes and metadata of the tensors, and every field of the configuration."
import json
import peft, torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_llm.adapter import FIELDS, save_adapter
from tiny_llm.lora import linear_shape, lora_modules
from .peers import CONFIG, WEIGHTS, cases, pair, same_state

@cases()
def test_files(name, how, tmp_path):
    mine, other = pair(name, **how)
    save_adapter(mine, tmp_path/"ours"); other.save_pretrained(tmp_path/"peft", save_embedding_layers=False)
    check_tensors(mine, tmp_path), check_config(tmp_path)

def check_tensors(mine, folder):
    tensors, shapes = load_file(folder/"ours"/WEIGHTS), {}
    for n, m in lora_modules(mine).items():
        d_out, d_in = linear_shape(m.base)
        shapes |= {f"base_model.model.{n}.lora_A.weight": (m.r, d_in), f"base_model.model.{n}.lora_B.weight": (d_out, m.r)}
    assert {k: tuple(t.shape) for k, t in tensors.items()} == shapes and not any("default" in k for k in tensors)
    assert same_state(tensors, load_file(folder/"peft"/WEIGHTS)) and all(t.dtype == torch.float32 for t in tensors.values())
    for who in ("ours", "peft"):
        with safe_open(folder/who/WEIGHTS, "pt") as f: assert f.metadata() == {"format": "pt"}

FREE = {"target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "auto_mapping", "r", "lora_alpha", "task_type"} # can be said in several ways

def check_config(folder):
    written, peft_wrote = (json.loads((folder/f/CONFIG).read_text()) for f in ("ours", "peft"))
    assert written.keys() == peft_wrote.keys() >= FIELDS.keys() and written["target_modules"] == sorted(written["target_modules"])
    read = peft.LoraConfig.from_pretrained(folder/"ours").to_dict()
    assert {k: sorted(v) if isinstance(v, set) else v for k, v in read.items()} == written
    assert written["peft_version"] == peft.__version__
    assert {k: v for k, v in written.items() if k not in FREE} == {k: v for k, v in peft_wrote.items() if k not in FREE}
