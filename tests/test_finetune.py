"The main job, small."
import pytest, torch
from tiny_llm.finetune import finetune, main
from tiny_llm.generate import load_base
from tiny_llm.gpt import fingerprint
from tiny_llm.lora import lora_parameters

DATA = [f"[INST] Tell me about the {a}.[/INST] The {a} was happy." for a in ("fox", "bear", "cat", "dog", "hen", "cow", "pig", "bee", "owl", "ant")]

def test_learns_and_keeps_the_base(tmp_path):
    seen = []
    result = finetune(None, DATA, DATA[:3], tmp_path/"a", max_steps=12, eval_every=4, lr=5e-3, callback=lambda s, loss: seen.append((s, loss)))
    assert [s for s, _ in seen] == list(range(1, 13)) and [loss for _, loss in seen] == result.losses
    assert [s for s, _ in result.valid_losses] == [0, 4, 8, 12] and result.valid_losses[-1][1] < 0.7 * result.valid_losses[0][1]
    assert fingerprint(result.model) == fingerprint(load_base()[0])

def test_same_seed_same_adapter(tmp_path):
    a, b, c = (finetune(None, DATA, [], tmp_path/str(i), max_steps=3, seed=s) for i, s in enumerate((0, 0, 1)))
    same = lambda x, y: all(torch.equal(p, q) for p, q in zip(lora_parameters(x.model), lora_parameters(y.model)))
    assert same(a, b) and not same(a, c) and a.valid_losses == []

def test_non_finite_loss_stops_and_the_last_good_adapter_survives(tmp_path):
    def poison(step, loss):
        if step == 4: next(iter(lora_parameters(made[0]))).data.fill_(float("nan"))
    import tiny_llm.finetune as ft
    made, original = [], ft.add_lora_to_model
    ft.add_lora_to_model = lambda m, *a: made.append(original(m, *a))
    try:
        with pytest.raises(FloatingPointError, match="step 5"): finetune(None, DATA, DATA[:2], tmp_path/"a", max_steps=9, eval_every=2, callback=poison)
    finally: ft.add_lora_to_model = original
    from tiny_llm.adapter import read_adapter
    assert all(t.isfinite().all() for t in read_adapter(tmp_path/"a")[1].values())

def test_command_line(tmp_path, capsys):
    data = tmp_path/"mine.jsonl"
    data.write_text("\n".join('{"instruction": "Name animal %d.", "output": "A fox."}' % i for i in range(12)))
    main(["--data", str(data), "--out", str(tmp_path/"out"), "--max-steps", "2", "--targets", "all-linear", "--r", "2"])
    said = capsys.readouterr().out
    assert "trained" in said and "fine-tuned:" in said and "load_with_lora" in said
    assert (tmp_path/"out"/"instruct"/"adapter_model.safetensors").exists()

@pytest.mark.parametrize("args", [["--task", "poetry"], ["--r", "many"]])
def test_bad_arguments(args):
    with pytest.raises(SystemExit): main(args)

def test_zero_steps(tmp_path):
    with pytest.raises(ValueError, match="max_steps"): finetune(None, DATA, [], tmp_path, max_steps=0)
