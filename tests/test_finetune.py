"The main job, small: learning, stopping, going on, and what it says to a user who errs."
import inspect, io, json, os, re, shutil, signal, subprocess, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
import tiny_llm.finetune as ft
from tiny_llm import instruct
from tiny_llm.adapter import load_adapter, load_with_lora, read_adapter, save_adapter
from tiny_llm.data import ASSETS, bundled_stories
from tiny_llm.files import BadFileError, read_jsonl
from tiny_llm.finetune import OPTIONS, finetune, main
from tiny_llm.generate import generate, load_base
from tiny_llm.gpt import GPT, GPTConfig, fingerprint, save_checkpoint
from tiny_llm.glance import Sample
from tiny_llm.lora import add_lora_to_model, lora_modules, lora_parameters
from tiny_llm.train import read_state

ANIMALS = ("fox", "bear", "cat", "dog", "hen", "cow", "pig", "bee", "owl", "ant")
DATA = [f"[INST] Tell me about the {a}.[/INST] The {a} was happy." for a in ANIMALS]
SETTINGS = dict(max_steps=160, eval_every=4, batch_size=2, lr=5e-3)
CHILD = f"""
import sys, torch
from tiny_llm.finetune import finetune
torch.set_num_threads(1)
DATA = {DATA!r}
finetune(sys.argv[1], DATA, DATA[:3], sys.argv[2], **{SETTINGS!r})
"""

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A small untrained base; with dropout, so that the random state matters."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")/"tiny.safetensors"
    save_checkpoint(GPT(GPTConfig(d_model=32, n_heads=2, n_layers=2, d_mlp=48, dropout=0.1)), path)
    return path

def run(tiny, out, **settings): return finetune(tiny, DATA, DATA[:3], out, **{**SETTINGS, "max_steps": 8, "eval_every": 2, **settings})
def adapter_bytes(out): return {k: t.numpy().tobytes() for k, t in read_adapter(out)[1].items()} # the file's header has no fixed order
def names(out): return sorted(p.name for p in out.iterdir())
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "tiny_llm.json"]

def stop_at(n, error=KeyboardInterrupt):
    def callback(step, loss):
        if step == n: raise error("stopped by the test")
    return callback

def test_learns_and_keeps_the_base(tmp_path):
    seen = []
    result = finetune(None, DATA, DATA[:3], tmp_path/"a", max_steps=12, eval_every=4, lr=5e-3, callback=lambda s, loss: seen.append((s, loss)))
    assert [s for s, _ in seen] == list(range(1, 13)) and [loss for _, loss in seen] == result.losses
    assert [s for s, _ in result.valid_losses] == [0, 4, 8, 12] and result.valid_losses[-1][1] < 0.7 * result.valid_losses[0][1]
    assert fingerprint(result.model) == fingerprint(load_base()[0]) and not result.model.training
    assert 0 < result.train_seconds < result.seconds and result.tokens_per_second == result.tokens / result.train_seconds
    assert names(tmp_path/"a") == ADAPTER

def test_tokens_are_those_of_the_examples(tiny, tmp_path):
    result = run(tiny, tmp_path, max_steps=5, batch_size=2) # one epoch
    assert result.tokens == sum(len(ids) - 1 for ids, _ in ft.encode_examples(DATA, result.tok))

def test_same_seed_same_adapter(tiny, tmp_path):
    a, b, c = (finetune(tiny, DATA, [], tmp_path/str(i), max_steps=3, seed=s) for i, s in enumerate((0, 0, 1)))
    same = lambda x, y: all(torch.equal(p, q) for p, q in zip(lora_parameters(x.model), lora_parameters(y.model)))
    assert same(a, b) and not same(a, c) and a.valid_losses == []

def test_the_best_adapter_is_returned_and_on_disk(tiny, tmp_path, monkeypatch):
    marks = iter([9.0, 5.0, 3.0, 4.0, 3.0])
    kept = []
    def loss(model, batches):
        kept.append([p.detach().clone() for p in lora_parameters(model)])
        return next(marks)
    monkeypatch.setattr(ft, "example_loss", loss)
    result = run(tiny, tmp_path)
    assert result.valid_losses == [(0, 9.0), (2, 5.0), (4, 3.0), (6, 4.0), (8, 3.0)]
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(result.model), kept[2])) # the first of equals
    loaded = load_with_lora(tiny, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(loaded), kept[2]))

# -- stopping ------------------------------------------------------------------------------------------

def poisoned(monkeypatch, at):
    "A callback that makes the model's first A NaN after step `at`."
    made, original = [], ft.add_lora_to_model
    monkeypatch.setattr(ft, "add_lora_to_model", lambda m, *a: made.append(original(m, *a)) or made[-1])
    def callback(step, loss):
        if step == at: lora_parameters(made[-1])[0].data.fill_(float("nan"))
    return callback

def test_non_finite_loss_names_step_and_batch_and_the_last_good_adapter_survives(tiny, tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError) as e: run(tiny, tmp_path, callback=poisoned(monkeypatch, 6), eval_every=3)
    said = str(e.value)
    assert "step 7, epoch 2, batch 2 of 5" in said and "loss nan" in said and len(said) < 500
    assert said.count("[INST] Tell me about the") == 2 # both examples of the batch
    assert all(t.isfinite().all() for t in read_adapter(tmp_path)[1].values())
    assert lora_modules(load_adapter(load_base(tiny)[0], tmp_path))

@pytest.mark.parametrize("valid", [DATA[:3], []])
def test_a_broken_adapter_never_replaces_a_good_one(tiny, tmp_path, monkeypatch, valid):
    original = ft.train_step
    def step(model, opts, *args, **how):
        step.n += 1
        loss = original(model, opts, *args, **how)
        if step.n == 4: lora_parameters(model)[0].data.fill_(float("inf")) # the very step before a validation
        return loss
    step.n = 0
    monkeypatch.setattr(ft, "train_step", step)
    with pytest.raises(FloatingPointError, match="step 4"): finetune(tiny, DATA, valid, tmp_path, max_steps=8, eval_every=2)
    assert all(t.isfinite().all() for t in read_adapter(tmp_path)[1].values())

def test_long_batches_are_named_shortly(tiny):
    tok = load_base(tiny)[1]
    said = ft.examples_of(torch.tensor([[tok.eot] + tok.encode("Some word " * 200)[:150]] * 8), tok)
    assert len(said) < 300 and said.startswith("'Some word ") and said.endswith("and 5 more") and said.count("…") == 3

# -- going on ------------------------------------------------------------------------------------------

def test_resume_after_sigkill_is_bit_identical(tiny, tmp_path):
    whole, killed = tmp_path/"whole", tmp_path/"killed"
    straight = run(tiny, whole, **SETTINGS)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tiny), str(killed)], stderr=subprocess.DEVNULL)
    while not (killed/"state.pt").exists():
        assert child.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the kill came too late"
    assert 0 < len(read_state(killed/"state.pt")["result"]["losses"]) < SETTINGS["max_steps"]
    torch.manual_seed(123) # whatever the process did before must not matter
    result = run(tiny, killed, **SETTINGS)
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert result.losses == straight.losses and result.valid_losses == straight.valid_losses and result.tokens == straight.tokens
    assert names(killed) == ADAPTER

@pytest.mark.parametrize("stop", [1, 4, 5, 8])
@pytest.mark.parametrize("valid", [DATA[:3], []])
def test_resume_after_an_exception_is_bit_identical(tiny, tmp_path, stop, valid):
    go = lambda out, **kw: finetune(tiny, DATA, valid, tmp_path/out, max_steps=8, eval_every=2, batch_size=3, **kw)
    whole, seen = go("whole"), []
    with pytest.raises(RuntimeError, match="by the test"): go("stopped", callback=stop_at(stop, RuntimeError))
    result = go("stopped", callback=lambda step, loss: seen.append(step))
    assert seen == list(range(stop // 2 * 2 + 1, 9))
    assert adapter_bytes(tmp_path/"stopped") == adapter_bytes(tmp_path/"whole")
    assert result.losses == whole.losses and result.valid_losses == whole.valid_losses and names(tmp_path/"stopped") == ADAPTER

def test_a_kill_between_adapter_and_state_loses_nothing(tiny, tmp_path, monkeypatch):
    run(tiny, tmp_path/"whole")
    original = ft.save_finetune_state
    def save(path, result, *rest):
        if len(result.losses) == 6: raise KeyboardInterrupt # the adapter of step 6 is written, its state is not
        original(path, result, *rest)
    monkeypatch.setattr(ft, "save_finetune_state", save)
    with pytest.raises(KeyboardInterrupt): run(tiny, tmp_path/"killed")
    monkeypatch.setattr(ft, "save_finetune_state", original)
    run(tiny, tmp_path/"killed")
    assert adapter_bytes(tmp_path/"killed") == adapter_bytes(tmp_path/"whole")

@pytest.mark.parametrize("change, said", [(dict(lr=1e-3), "lr 0.005, now 0.001"), (dict(r=4), "r 8, now 4"), (dict(alpha=8), "alpha 16.0, now 8.0"),
    (dict(mask_prompt=False), "mask_prompt True, now False"), (dict(seq_len=200), "seq_len 256, now 200"), (dict(seed=1), "seed 0, now 1"),
    (dict(max_steps=9), "max_steps 8, now 9"), (dict(targets="all-linear"), "layers "), (dict(eval_every=4), "eval_every 2, now 4")])
def test_the_state_of_another_run_is_refused(tiny, tmp_path, change, said):
    with pytest.raises(KeyboardInterrupt): run(tiny, tmp_path, callback=stop_at(3))
    with pytest.raises(ValueError, match="another run") as e: run(tiny, tmp_path, **change)
    assert said in str(e.value) and "another folder" in str(e.value) and "--fresh" in str(e.value)
    assert "state.pt" in names(tmp_path) # it can still go on
    assert run(tiny, tmp_path, resume=False, **change).losses and names(tmp_path) == ADAPTER

def test_other_examples_and_another_base_are_other_runs(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt): run(tiny, tmp_path/"a", callback=stop_at(3))
    with pytest.raises(ValueError, match="another run.*examples"): finetune(tiny, DATA[:9], DATA[:3], tmp_path/"a", **{**SETTINGS, "max_steps": 8, "eval_every": 2})
    torch.manual_seed(1)
    save_checkpoint(GPT(GPTConfig(d_model=32, n_heads=2, n_layers=2, d_mlp=48, dropout=0.1)), tmp_path/"other.safetensors")
    with pytest.raises(ValueError, match="another run.*base"): run(tmp_path/"other.safetensors", tmp_path/"a")

@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "unsafe"])
def test_a_damaged_state_is_refused(tiny, tmp_path, damage):
    with pytest.raises(KeyboardInterrupt): run(tiny, tmp_path, callback=stop_at(3))
    state = tmp_path/"state.pt"
    if damage == "cut": state.write_bytes(state.read_bytes()[:-500])
    if damage == "empty": state.write_bytes(b"")
    if damage == "text": state.write_text("not a state")
    if damage == "foreign": torch.save({"run": {}}, state)
    if damage == "unsafe": torch.save({"run": stop_at}, state) # would need code to be run
    with pytest.raises(BadFileError, match="state.pt.*--fresh"): run(tiny, tmp_path)
    assert run(tiny, tmp_path, resume=False).losses

def test_leftovers_of_a_kill_while_writing_are_cleaned_up_and_nothing_else(tiny, tmp_path):
    (tmp_path/".lock").write_text(json.dumps(dict(process=99999, host="h", started="then", mark="abcd1234"))) # its owner is dead
    (tmp_path/".state.pt.abcd12340.99999.tmp").write_bytes(b"half a state")
    for other in (".state.pt.fedc43210.77777.tmp", ".mine.tmp"): (tmp_path/other).write_bytes(b"a neighbour's")
    run(tiny, tmp_path)
    assert names(tmp_path) == [".mine.tmp", ".state.pt.fedc43210.77777.tmp", *ADAPTER]

# -- one folder ----------------------------------------------------------------------------------------

def test_a_folder_has_one_owner(tiny, tmp_path):
    refused = []
    def second(step, loss): # begun beside the first, before its first validation
        if step == 1: refused.append(ThreadPoolExecutor(1).submit(run, tiny, tmp_path, seed=1).exception())
    first, alone = run(tiny, tmp_path/"a", callback=None), tmp_path/"a"
    tmp_path = tmp_path/"b"
    again = run(tiny, tmp_path, callback=second)
    assert isinstance(refused[0], FileExistsError) and f"in use by process {os.getpid()} on" in str(refused[0]) and "started 20" in str(refused[0])
    assert adapter_bytes(tmp_path) == adapter_bytes(alone) and again.losses == first.losses and names(tmp_path) == ADAPTER

def test_a_run_gives_back_its_own_adapter(tiny, tmp_path):
    alone, other = run(tiny, tmp_path/"alone"), run(tiny, tmp_path/"other", seed=1)
    def foreign(step, loss):
        if step == 8: shutil.copytree(tmp_path/"other", tmp_path/"mine", dirs_exist_ok=True)
    mine = run(tiny, tmp_path/"mine", callback=foreign)
    same = lambda a, b: all(map(torch.equal, lora_parameters(a.model), lora_parameters(b.model)))
    assert same(mine, alone) and not same(mine, other)

def test_a_finished_adapter_of_another_run_is_not_replaced(tiny, tmp_path):
    run(tiny, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"adapter of another run \(lr 0.005, now 0.001\): choose another folder.*--fresh"): run(tiny, tmp_path, lr=1e-3)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    run(tiny, tmp_path, lr=1e-3, resume=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} != before and lora_modules(load_with_lora(tiny, tmp_path))
    save_adapter(load_with_lora(tiny, tmp_path), tmp_path) # by hand: nobody knows how it was made
    with pytest.raises(ValueError, match=r"adapter of another run \(made elsewhere\)"): run(tiny, tmp_path, lr=1e-3)

def test_a_run_that_cannot_begin_throws_nothing_away(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt): run(tiny, tmp_path, callback=stop_at(3))
    left = names(tmp_path)
    for bad in (dict(max_steps=0), dict(lr=-1.0), dict(r=0), dict(batch_size=0)):
        with pytest.raises(ValueError): run(tiny, tmp_path, resume=False, **bad)
    assert names(tmp_path) == left and "state.pt" in left

def test_held_out_examples_that_are_all_too_long_are_no_error(tiny, tmp_path):
    with pytest.warns(UserWarning, match="nothing can be validated, so the latest adapter is kept: nothing to learn: none of 1"):
        result = finetune(tiny, DATA, ["[INST] " + "long " * 300 + "[/INST] A."], tmp_path, max_steps=1)
    assert result.valid_losses == [] and names(tmp_path) == ADAPTER
    with pytest.raises(ValueError, match="nothing to measure"): ft.example_loss(result.model, [])

def test_a_finished_run_can_be_repeated(tiny, tmp_path):
    first = run(tiny, tmp_path).losses
    assert run(tiny, tmp_path).losses == first

# -- the module ----------------------------------------------------------------------------------------

def test_names_of_the_data_chapter_are_here_too():
    assert set(instruct.__all__) <= set(ft.__all__)
    scope = {}
    exec("from tiny_llm.finetune import *", scope)
    assert scope["make_moral_dataset"] is instruct.make_moral_dataset

def test_signature_and_options_agree():
    p = inspect.signature(finetune).parameters
    fixed = "base_ckpt train_examples valid_examples out_dir r alpha lr max_steps batch_size seq_len targets mask_prompt seed callback"
    assert list(p)[:14] == fixed.split()
    assert (p["r"].default, p["alpha"].default, p["batch_size"].default, p["seq_len"].default, p["seed"].default) == (8, 16, 8, 256, 0)
    assert all(p[k].default == v for k, (v, _) in OPTIONS.items() if k != "seq_len") # the moral examples need more
    assert ft.parser().parse_args([]).mask_prompt == p["mask_prompt"].default
    assert inspect.signature(ft.train_adapter).parameters["eval_every"].default == OPTIONS["eval_every"][0]

def test_endless_finds_its_place(tiny):
    tok = load_base(tiny)[1]
    make = lambda: ft.endless(ft.encode_examples(DATA, tok), 4, tok.pad, seed=3)
    a, b = make(), make()
    batches = [next(a) for _ in range(8)]
    b.step = 5
    assert all(torch.equal(x, y) for p, q in zip(batches[5:], b) for x, y in zip(p, q))
    assert a.place() == "epoch 3, batch 2 of 3" and sum(len(x) for x, _ in batches[:3]) == len(DATA)
    with pytest.raises(ValueError, match="no examples"): ft.endless([], 4, 0, 0)

def test_two_seeds_share_no_epoch(tiny):
    tok = load_base(tiny)[1]
    encoded = ft.encode_examples([f"[INST] q{i}[/INST] {'word ' * (i % 30 + 1)}" for i in range(40)], tok, 64)
    def epochs(seed, n=3):
        stream = ft.endless(encoded, 4, tok.pad, seed)
        return [str([next(stream)[0].tolist() for _ in range(10)]) for _ in range(n)]
    assert len({e for seed in range(4) for e in epochs(seed)}) == 12 and epochs(1) == epochs(1)

@pytest.mark.parametrize("adapted", [True, False])
def test_the_bare_loop(adapted):
    "Against PyTorch's own schedule, in double precision; and what is frozen stays."
    def job():
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=4096, d_model=32, n_heads=2, n_layers=2, d_mlp=48)).double()
        return add_lora_to_model(model, 2) if adapted else model, ft.endless(ft.encode_examples(DATA, tok), 4, tok.pad, seed=1)
    tok, seen = load_base()[1], []
    (model, stream), (naive, batches), frozen = job(), job(), fingerprint(job()[0])
    opt = ft.train_model(model, stream, 1e-2, 12, seen.append)
    want = torch.optim.AdamW(lora_parameters(naive) if adapted else naive.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(want, lambda step: ft.lr_scale(step, 12))
    for _ in range(12):
        x, y = next(batches)
        torch.nn.functional.cross_entropy(naive(x).flatten(0, 1), y.flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
        want.step(); schedule.step(); want.zero_grad()
    assert seen == list(range(1, 13)) and stream.step == 12 and type(opt) is torch.optim.AdamW
    for p, q in zip(model.parameters(), naive.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert (fingerprint(model) == frozen) == adapted

@pytest.mark.parametrize("bad", [dict(max_steps=0), dict(eval_every=0), dict(batch_size=0), dict(lr=-1.0), dict(r=0)])
def test_bad_settings(tiny, tmp_path, bad):
    with pytest.raises(ValueError): run(tiny, tmp_path, **bad)

# -- the command ---------------------------------------------------------------------------------------

def test_command_line(tmp_path, capsys):
    data = tmp_path/"mine.jsonl"
    data.write_text("\n".join('{"instruction": "Name animal %d.", "output": "A fox."}' % i for i in range(12)))
    main(["--data", str(data), "--out", str(tmp_path/"out"), "--max-steps", "2", "--targets", "all-linear", "--r", "2"])
    said = capsys.readouterr().out
    total = sum(p.numel() for p in load_base()[0].parameters())
    loaded = load_with_lora(None, tmp_path/"out"/"mine")
    trained = sum(p.numel() for p in lora_parameters(loaded))
    assert f"{total:,} of {total:,} parameters" in said and f"{trained:,} of {total + trained:,} are trainable" in said
    assert "Trained" in said and said.count("fine-tuned:") == 2 and "Loss on held-out answers" in said
    exec(said[said.index("    from tiny_llm.adapter"):].replace("    ", ""), scope := {}) # how to load it
    assert fingerprint(scope["model"]) == fingerprint(loaded)

def test_few_examples_of_ones_own(tiny, tmp_path, capsys):
    data = tmp_path/"mine.jsonl"
    data.write_text('{"instruction": "Name an animal.", "output": "A fox."}')
    main(["--data", str(data), "--base", str(tiny), "--out", str(tmp_path), "--max-steps", "1"])
    said = capsys.readouterr().out
    assert "no examples held out" in said and "== Name an animal." in said

@pytest.mark.parametrize("args, said", [(["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--base", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--targets", "attn.nope"], "attn.qkv"), (["--r", "0"], "rank"), (["--data", "bad.json"], "bad.json"), (["--max-steps", "0"], "max_steps"),
    (["--base", "bad.json"], "bad.json"), (["--data", "."], "error: .")])
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"bad.json").write_text("{]")
    with pytest.raises(SystemExit) as e: main(["--max-steps", "1", *args])
    err = capsys.readouterr().err
    line = next(l for l in err.splitlines() if "error:" in l)
    assert e.value.code == 2 and said in line and line.startswith("python -m tiny_llm.finetune: error:") and "Traceback" not in err
    assert ("(ShareGPT)" in err) == ("--data" in args and args[1] != "nowhere.jsonl") and names(tmp_path) == ["bad.json"] # nothing else has changed

def test_another_run_on_the_command_line_needs_fresh(tiny, tmp_path, capsys):
    data = tmp_path/"mine.jsonl"
    data.write_text("\n".join('{"instruction": "Name animal %d.", "output": "A fox."}' % i for i in range(12)))
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"state.pt").write_bytes(b"")
    args = ["--data", str(data), "--base", str(tiny), "--out", str(tmp_path), "--max-steps", "1"]
    with pytest.raises(SystemExit): main(args)
    assert "--fresh" in capsys.readouterr().err
    main([*args, "--fresh"])
    assert names(tmp_path/"mine") == ADAPTER

@pytest.mark.parametrize("there, args, said", [(False, [], "nothing was saved yet; the same command begins again"), (True, [], "the same command goes on from the last validation"),
    (True, ["--fresh"], "the same command without --fresh goes on"), (True, ["--tell", "log"], "nothing was saved"), (True, ["--sweep", "log"], "the runs that are missing")])
def test_ctrl_c_says_the_truth(tiny, tmp_path, capsys, monkeypatch, there, args, said):
    monkeypatch.chdir(tmp_path)
    def stopped(*args, **kwargs): raise KeyboardInterrupt
    for name in ("finetune", "_tell", "log_runs", "load_with_lora"): monkeypatch.setattr(ft, name, stopped)
    if there: (tmp_path/"instruct").mkdir(); (tmp_path/"instruct/state.pt").write_bytes(b"")
    with pytest.raises(SystemExit) as e: main(["--base", str(tiny), "--out", str(tmp_path), *args])
    assert e.value.code == 130 and said in capsys.readouterr().err

def own(path, *rows):
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    return str(path)
def asks(n, **fields): return [dict(instruction=f"Name animal {i}.", output="A fox.", **fields) for i in range(n)]

@pytest.mark.parametrize("i, n", [(0, 12), (0, 10), (3, 1)])
def test_a_prompt_that_is_too_long_to_ask_ends_nothing(tiny, tmp_path, capsys, i, n):
    rows = [dict(r, instruction="very long " * 600) if j == i or n == 12 and j < 6 else r for j, r in enumerate(asks(n))]
    main(["--data", own(tmp_path/"l.jsonl", *rows), "--base", str(tiny), "--out", str(tmp_path), "--max-steps", "1"])
    assert "The adapter is in" in capsys.readouterr().out and load_with_lora(tiny, tmp_path/"l")

def test_nothing_to_ask_and_a_report_that_fails(tiny, tmp_path, capsys, monkeypatch):
    result = run(tiny, tmp_path/"a", max_steps=1)
    said = ft.report(result, ft.parser().parse_args(["--data", "x"]), [f"[INST] {'long ' * 600}[/INST] A."])
    assert "None of the examples to ask about leaves room" in said and "load_with_lora" in said
    for error in (RuntimeError("no plot"), KeyboardInterrupt()):
        def fails(*args): raise error
        monkeypatch.setattr(ft, "report", fails)
        result = main(["--data", own(tmp_path/"m.jsonl", *asks(12)), "--base", str(tiny), "--out", str(tmp_path), "--max-steps", "1"])
        assert f"the report ended early ({type(error).__name__}" in (err := capsys.readouterr().err) and str(tmp_path/"m") in err and result.losses

def test_a_console_that_cannot_show_a_sign(tiny, tmp_path):
    data = own(tmp_path/"zh.jsonl", *[dict(instruction=f"\u4f60\u597d {i}", output="\u4e16\u754c \U0001F98A") for i in range(12)])
    done = subprocess.run([sys.executable, "-m", "tiny_llm.finetune", "--data", data, "--base", str(tiny), "--out", str(tmp_path), "--max-steps", "1"],
                          capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, timeout=200)
    assert done.returncode == 0 and b"== ?? " in done.stdout and b"The adapter is in" in done.stdout and b"ended early" not in done.stderr

def test_bad_records_on_the_command_line(tiny, tmp_path, capsys):
    data = own(tmp_path/"m.jsonl", *asks(12, id="x"), *[dict(instruction="q", output="")] * 3)
    args = ["--data", data, "--base", str(tiny), "--out", str(tmp_path/"out"), "--max-steps", "1"]
    with pytest.raises(SystemExit): main(args)
    err = capsys.readouterr().err
    assert all(t in err for t in ("3 records cannot be used", "line 13: field 'output' is empty", "line 15", "--skip-bad", "(Alpaca)", "(ShareGPT)")) and not (tmp_path/"out").exists()
    main([*args, "--skip-bad"])
    said = capsys.readouterr()
    assert "note: " in said.err and "skipped 3 of 15 records" in said.err and "field 'id' is not read (12x)" in said.err
    assert "1 steps x 8 = 8 of 10 examples\n" in said.out # two of twelve are held out

def test_how_many_examples_will_be_seen():
    args = ft.parser().parse_args(["--max-steps", "150"])
    assert ft.plan(args, [""] * 18_000, []).endswith("150 steps x 8 = 1,200 of 18,000 examples") and ft.plan(args, [""] * 480, []).endswith("1,200, each of 480 examples 2.5 times")

@pytest.mark.parametrize("args, folder", [([], "adapters/instruct"), (["--task", "moral"], "adapters/moral"), (["--data", "x/mine.v2.jsonl.gz"], "adapters/mine"), (["--data", ".json"], "adapters/data"),
    (["--data", "mine.json", "--out", "o"], "o/mine"), (["--out", "~/o"], "HOME/o/instruct"), (["--data", "..", "--out", "o"], "o/data")])
def test_the_folder_of_an_adapter(monkeypatch, args, folder):
    monkeypatch.setenv("HOME", "HOME")
    assert str(ft._out(ft.parser().parse_args(args))) == folder

@pytest.mark.parametrize("args", [["--out", "file"], ["--tell", "folder"], ["--sweep", "folder"], ["--tell", "file/log"], ["--sweep", "file/log"]])
def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, capsys, args):
    def work(*args, **how): raise AssertionError("too late")
    for name in ("examples_for", "_tell", "_full_run", "load_with_lora", "finetune"): monkeypatch.setattr(ft, name, work)
    monkeypatch.chdir(tmp_path)
    (tmp_path/"file").write_text("")
    (tmp_path/"folder").mkdir()
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 2 and args[1].split("/")[0] in capsys.readouterr().err and names(tmp_path) == ["file", "folder"]

@pytest.mark.parametrize("args", [["--task", "poetry"], ["--r", "many"]])
def test_bad_arguments(args):
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 2

def test_help_says_something_about_every_option(capsys):
    with pytest.raises(SystemExit) as e: main(["--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0 and all(len(a.help.split()) > 1 and "--" + a.dest.replace("_", "-") in said for a in ft.parser()._actions)

def test_a_complete_sweep_is_left_as_it_is(tmp_path):
    shutil.copy(ASSETS/"lr_log.jsonl", log := tmp_path/"log.jsonl")
    assert main(["--sweep", str(log)]) == read_jsonl(log) == read_jsonl(ASSETS/"lr_log.jsonl")

def test_what_is_shown_while_it_runs():
    told = ft.progress(ft.FinetuneResult(losses=[2.0, 1.5], valid_losses=[(0, 3.0), (2, 2.25)], tokens=3000, train_seconds=2.0))
    assert told == dict(loss="1.500", valid="2.250", tok_s="1,500")
    assert ft.progress(ft.FinetuneResult(losses=[1.0])) == dict(loss="1.000", tok_s="0")

@pytest.mark.parametrize("steps, scales", [(40, {0: 0.1, 4: 0.5, 8: 0.8, 20: 0.5, 39: 0.025}), (4, {0: 0.25, 1: 0.5, 2: 0.5, 3: 0.25})])
def test_the_rate_rises_and_falls(steps, scales): assert {s: ft.lr_scale(s, steps) for s in scales} == pytest.approx(scales)

def test_plot_draws_where_it_is_told_to():
    import matplotlib.pyplot as plt
    done = ft.FinetuneResult(losses=[3.0, 2.0], valid_losses=[(0, 4.0), (2, 2.5)])
    mine = plt.subplots()[1]
    assert done.plot(mine) is mine and done.plot() is not mine
    assert [line.get_xydata().tolist() for line in mine.lines] == [[[1, 3], [2, 2]], [[0, 4], [2, 2.5]]]
    assert (mine.get_xlabel(), mine.get_ylabel()) == ("step", "loss (nats per token)") and len(mine.get_legend().get_texts()) == 2
    plt.close("all")

@pytest.mark.parametrize("n, held_out", [(9, 0), (10, 1), (11, 2), (21, 3), (2000, 100)])
def test_a_tenth_of_ones_own_examples_is_held_out(tmp_path, n, held_out):
    data = own(tmp_path/"own.jsonl", *[dict(instruction=f"Say {i}.", output=str(i)) for i in range(n)])
    train, valid = ft.examples_for(ft.parser().parse_args(["--data", data]))
    assert len(valid) == held_out and len(train) + len(valid) == n == len({*train, *valid})
    assert train == sorted(train, key=lambda e: int(e.rpartition(" ")[2])) # as in the file
    other = ft.examples_for(ft.parser().parse_args(["--data", data, "--seed", "1"]))[1]
    assert ft.examples_for(ft.parser().parse_args(["--data", data]))[1] == valid and (other != valid) == (n > 9)

def test_a_conversation_is_held_out_whole_and_so_is_what_stands_twice(tmp_path):
    talk = lambda i, n: dict(messages=[dict(role=r, content=f"{t}{i}") for r, t in zip(["user", "assistant"] * 2, "abcd"[:n])])
    rows = [talk(i, 4) for i in range(20)] + [talk(i, 2) for i in range(10)] # the beginning of a talk is no other talk
    rows += [dict(story=f"Fox {i % 7}.") for i in range(30)] + [dict(story=f" fox  {i}.") for i in range(7)] # each gets a prompt of its own
    for seed in range(5):
        train, valid = ft.examples_for(ft.parser().parse_args(["--data", own(tmp_path/"d.jsonl", *rows), "--seed", str(seed)]))
        answer = lambda e: e.rpartition("[/INST]")[2].strip().casefold().replace("  ", " ")
        assert valid and not {answer(e) for e in valid} & {answer(e) for e in train} and len(train) + len(valid) == 87
        assert not any(v in t for v in valid for t in train) and sum(v.count("[INST]") == 2 for v in valid) <= sum(v.count("[INST]") == 1 for v in valid)

def test_what_weighs_nothing_is_refused_where_prompts_are_learned(tmp_path):
    data = own(tmp_path/"d.jsonl", dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="BAD", weight=0), dict(role="user", content="r"), dict(role="assistant", content="good")]))
    with pytest.warns(UserWarning, match="not learned"): assert len(ft.examples_for(ft.parser().parse_args(["--data", data]))[0]) == 1
    with pytest.raises(BadFileError, match="weight 0 would be learned"): ft.examples_for(ft.parser().parse_args(["--data", data, "--no-mask-prompt"]))

@pytest.mark.parametrize("args, asked", [([], ft.SHOWN), (["--task", "moral"], ["What?"]), (["--data", "x"], ["What?"])])
def test_the_report_asks_what_was_learned(tiny, tmp_path, monkeypatch, args, asked):
    result = run(tiny, tmp_path/"a", max_steps=1)
    (result.out_dir/"more").write_bytes(bytes(5_000_000 - sum(p.stat().st_size for p in result.out_dir.iterdir())))
    prompts = []
    monkeypatch.setattr(ft, "side_by_side", lambda model, tok, p, n: prompts.extend(p) or [])
    monkeypatch.setattr(ft, "glance_table", lambda model, tok, asked: f"table of {len(asked)}")
    assert "(5000 KB)" in ft.report(result, ft.parser().parse_args(args), ["[INST] What?[/INST] That."])
    assert prompts == asked

def test_a_run_of_the_sweep_is_the_main_job_scored_on_answers(tiny, monkeypatch):
    made, real = [], finetune
    def small(base, train, valid, folder, seq_len, **how):
        made.append(dict(how, seq_len=seq_len, examples=(len(train), len(valid))))
        results.append(real(tiny, DATA, DATA[:3], folder, **{**SETTINGS, "max_steps": 1}))
        return results[0]
    results, held_out = [], instruct.make_instruction_dataset(bundled_stories("valid"))
    monkeypatch.setattr(ft, "finetune", small)
    row = ft._full_run(1e-3, False, 1)
    loss = lambda masked: ft.example_loss(results[0].model, ft.encoded_batches(ft.encode_examples(held_out, results[0].tok, 288, masked), 8, results[0].tok.pad))
    assert row["answer_loss"] == pytest.approx(loss(True), rel=1e-6) and abs(loss(True) - loss(False)) > 1e-3
    assert made == [dict(lr=1e-3, mask_prompt=False, seed=1, seq_len=OPTIONS["seq_len"][0], examples=tuple(len(bundled_stories(s)) for s in ("train", "valid")))]
    assert row.keys() == {"answer_loss", "has", "seconds"} and 0 <= row["has"] <= 1 and 1 < row["answer_loss"] < 20

def test_both_sides_are_sampled_alike():
    (base, tok), model = load_base(), load_with_lora(None, ASSETS/"adapters/instruct")
    prompts = ["Tell me a story about a dog.", "Tell me a story."]
    asked = [f"[INST] {p}[/INST]" for p in prompts]
    how = dict(max_new_tokens=30, temperature=0.6, top_p=0.9, seed=5)
    stripped = lambda m: [text.strip() for text in generate(m, tok, asked, **how)]
    assert ft.side_by_side(model, tok, prompts, 30, seed=5) == list(zip(prompts, stripped(base), stripped(model)))
    told = ft.before_after(model, tok, prompts, 30, seed=5)
    assert [s.text for s in told["fine-tuned"]] == stripped(model) and [s.prompt for s in told["base"]] == prompts

def test_the_table_counts_what_was_told(monkeypatch):
    monkeypatch.setattr(ft, "before_after", lambda model, tok, prompts: {"base": [Sample(p, "No.", False) for p in prompts],
        "fine-tuned": [Sample(p, "Once " + p, True) for p in prompts]})
    first, asked, *_ = ft.glance_table(None, None, [("dog", "ball"), ("cat", "hat")]).splitlines()
    assert first.split() == ["base", "fine-tuned"] and re.findall(r"(\d+)% \(", asked) == ["0", "100"]

def test_stories_for_the_log(monkeypatch, tmp_path):
    monkeypatch.setattr(ft, "ASKED", ft.ASKED[:2])
    model = load_with_lora(None, ASSETS/"adapters/instruct")
    rows = ft._tell(model, tmp_path/"log.jsonl")
    assert rows == read_jsonl(tmp_path/"log.jsonl") and [r["by"] for r in rows] == ["base"] * 2 + ["fine-tuned"] * 2 + ["free"] * 2
    assert all(r["text"] and len(r["things"]) == 2 for r in rows) and {r["prompt"] for r in rows if r["by"] == "free"} == {""}

def test_as_a_module(tmp_path):
    said = subprocess.run([sys.executable, "-m", "tiny_llm.finetune", "--help"], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert said.returncode == 0 and "--max-steps" in said.stdout
