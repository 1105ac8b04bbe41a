"Pretraining: what a kill, a bad number and a wrong folder must not do."
import os, signal, subprocess, sys, time
import pytest, torch
from tiny_llm import train
from tiny_llm.data import bundled_stories, load_ids, prepare
from tiny_llm.files import BadFileError
from tiny_llm.generate import load_base
from tiny_llm.gpt import GPT, GPTConfig, load_checkpoint
from tiny_llm.train import (OPTIMIZERS, PretrainConfig, load_state, main, make_optimizers, param_groups, perplexity, pretrain, read_log, read_state,
                            score_windows, story_loss, train_step)

TINY = dict(d_model=16, n_heads=2, n_layers=1, d_mlp=32, dropout=0.1)
SETTINGS = dict(steps=60, tokens_per_step=256, seq_len=64, warmup=2, eval_every=4)
CHILD = """
import sys, torch
from tiny_llm.gpt import GPTConfig
from tiny_llm.train import PretrainConfig, pretrain
torch.set_num_threads(1)
pretrain(sys.argv[1], PretrainConfig(optimizer=sys.argv[3], **{settings}), GPTConfig(**{tiny}), sys.argv[2], device="cpu", show=False)
""".format(settings=SETTINGS, tiny=TINY)

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    prepare("bundled", data_dir=path)
    return path

def state(out): return read_state(out / "state.pt")

def run(out, data, optimizer): pretrain(out, PretrainConfig(optimizer=optimizer, **SETTINGS), GPTConfig(**TINY), data, device="cpu", show=False)

@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_after_sigkill_is_bit_identical(tmp_path, data, optimizer):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, data, optimizer)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(killed), str(data), optimizer])
    while not (killed / "state.pt").exists():
        assert child.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the kill came too late"
    at = state(killed)["progress"]["step"]
    assert 0 < at < SETTINGS["steps"]
    run(killed, data, optimizer)
    a, b = state(whole), state(killed)
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for x, y in zip(a["opts"], b["opts"]):
        assert all(torch.equal(x["state"][i][k], y["state"][i][k]) for i in x["state"] for k in x["state"][i])
    drop = lambda s: [{k: v for k, v in r.items() if k != "seconds"} for r in s["progress"]["log"]]
    assert drop(a) == drop(b)
    best = [load_checkpoint(d / "model.safetensors").state_dict() for d in (whole, killed)]
    assert all(torch.equal(best[0][k], best[1][k]) for k in best[0])

@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
def test_param_groups_cover_each_parameter_once(optimizer, tied):
    model = GPT(GPTConfig(**TINY, tie_weights=tied))
    groups = param_groups(model)
    flat = [p for ps in groups.values() for p in ps]
    assert len(flat) == len(set(flat)) and set(flat) == set(model.parameters())
    assert all(p.ndim == 1 for p in groups["vectors"]) and len(groups["matrices"]) == 5
    held = [(p, g["weight_decay"]) for o in make_optimizers(model, PretrainConfig(optimizer=optimizer)) for g in o.param_groups for p in g["params"]]
    assert len(held) == len(flat) and {p for p, _ in held} == set(flat)
    assert all((wd > 0) == (p.ndim == 2) for p, wd in held)

def test_non_finite_loss_leaves_the_weights_alone():
    model = GPT(GPTConfig(**TINY))
    with torch.no_grad(): model.norm_f.weight[0] = float("inf")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opts = make_optimizers(model, PretrainConfig())
    with pytest.raises(FloatingPointError): train_step(model, opts, torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), 1e-3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

def test_a_failed_step_leaves_no_gradient_behind():
    "Field case 46: the next step is as if the failed one had not been tried."
    torch.manual_seed(0)
    models = [GPT(GPTConfig(**{**TINY, "dropout": 0.0})) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts, x = [make_optimizers(m, PretrainConfig()) for m in models], torch.randint(0, 300, (2, 8))
    with pytest.raises(FloatingPointError): train_step(models[0], opts[0], x, x, 1e-3, loss_of=lambda x, y: models[0](x).sum() * float("nan"))
    def half(x, y): models[0](x).sum().backward(); raise KeyError # whatever the error
    with pytest.raises(KeyError): train_step(models[0], opts[0], x, x, 1e-3, loss_of=half)
    assert all(p.grad is None for p in models[0].parameters())
    a, b = (train_step(m, o, x, x, 1e-3) for m, o in zip(models, opts))
    assert a == b and all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters()))

def test_non_finite_loss_stops_with_the_step(tmp_path, data, monkeypatch):
    real, calls = train.train_step, []
    def step(*args):
        calls.append(1)
        if len(calls) == 6: raise FloatingPointError("loss nan")
        return real(*args)
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(FloatingPointError, match="step 6"):
        pretrain(tmp_path, PretrainConfig(**SETTINGS), GPTConfig(**TINY), data, device="cpu", show=False)
    assert state(tmp_path)["progress"]["step"] == 4  # the last good one is still there

def test_refusals(tmp_path, data):
    with pytest.raises(ValueError, match="adamw, muon"): PretrainConfig(optimizer="sgd")
    with pytest.raises(ValueError, match="lr=nan, clip=0, drop_start=2, seed=-1 cannot"): PretrainConfig(lr=float("nan"), clip=0, drop_start=2, seed=-1)
    with pytest.raises(FileNotFoundError, match="prepare"): pretrain(tmp_path / "a", data_dir=tmp_path / "none", show=False)
    with pytest.raises(ValueError, match="vocab_size"): pretrain(tmp_path / "a", config=GPTConfig(vocab_size=300), data_dir=data, show=False)
    with pytest.raises(ValueError, match="max_seq_len"): pretrain(tmp_path / "a", config=GPTConfig(max_seq_len=64), data_dir=data, show=False)
    run = lambda **kw: pretrain(tmp_path / "run", PretrainConfig(**{**SETTINGS, "steps": 2, "eval_every": 1, **kw}), GPTConfig(**TINY), data, device="cpu", show=False)
    run()
    with pytest.raises(ValueError, match="another run.*lr"): run(lr=1.0)
    path = tmp_path / "run" / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadFileError, match="state.pt"): run()

@pytest.mark.parametrize("n", [2, 5, 8, 9, 12, 13, 40])
@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_windows_score_each_token_once_with_context(n, size):
    scored = []
    for x, y in score_windows(list(range(n)), size):
        assert len(x) == len(y) <= size
        for i, t in enumerate(y):
            if t == -100: continue
            scored.append(int(t))
            assert t == x[i] + 1 and (x[0] == 0 or i >= size // 2)
    assert sorted(scored) == list(range(1, n))

def test_perplexity_of_long_story_and_of_nothing(data):
    tok = prepare("bundled", data_dir=data)
    torch.manual_seed(0)
    wide = GPT(GPTConfig(**TINY, max_seq_len=128))
    narrow = GPT(GPTConfig(**TINY, max_seq_len=16))
    narrow.load_state_dict(wide.state_dict())
    text = "The small cat saw a big red ball in the park and ran to it. " * 3
    for start in (False, True): assert abs(perplexity(wide, tok, [text], start) / perplexity(narrow, tok, [text], start) - 1) < 0.05
    with pytest.raises(ValueError, match="no token"): perplexity(wide, tok, [""])

def test_no_stories_no_loss():
    with pytest.raises(ValueError, match="no stories"): story_loss(GPT(GPTConfig(**TINY)), [])

# The command, as people use it

QUICK = "--quiet --steps 2 --eval-every 2 --tokens-per-step 600 --d-model 16 --n-layers 1 --n-heads 2".split()
SEP = "\n<|endoftext|>\n"

def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

@pytest.fixture
def texts(tmp_path):
    "Two texts of one's own."
    stories = [r["story"] for r in bundled_stories("valid")[:40]]
    for name, text in dict(A=SEP.join(stories), B=SEP.join(s[::-1] for s in stories)).items(): (tmp_path/f"{name}.txt").write_text(text)
    return tmp_path

def command(texts, name, *how, code=None):
    argv = ["--source", str(texts/f"{name}.txt"), "--out", str(texts/"new"/"out"), "--vocab-size", "400", *QUICK, *how]
    if code is None: return main(argv)
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == code

def test_a_refused_run_has_changed_nothing(texts, capsys):
    "Field case 4, in a folder of another run, with or without its state, of a stranger's model, and in a new one."
    out = texts/"new"/"out"
    command(texts, "A"); before = contents(out)
    for name, how in (("B", []), ("A", ["--lr", "1"]), ("A", ["--vocab-size", "500"])):
        command(texts, name, *how, code=2); assert contents(out) == before and "another run (different" in capsys.readouterr().err
    (out/"state.pt").unlink(); command(texts, "B", code=2)
    (out/"log.jsonl").write_text(""); command(texts, "A", code=2); assert "no log of a run" in capsys.readouterr().err
    (out/"log.jsonl").unlink(); command(texts, "A", code=2)
    assert "not trained there" in capsys.readouterr().err and contents(out) == {k: v for k, v in before.items() if k.name not in ("state.pt", "log.jsonl")}

@pytest.mark.parametrize("how", [["--hold", "2"], ["--n-valid", "40"], ["--d-model", "15"], ["--source", "no/such"], ["--vocab-size", "70000"]])
def test_a_refused_run_leaves_no_folder(texts, how):
    command(texts, "A", *how, code=2)
    assert sorted(p.name for p in texts.iterdir()) == ["A.txt", "B.txt"]

def test_the_model_knows_its_tokenizer(texts):
    "Field case 5: another tokenizer.json beside it is refused."
    command(texts, "A"); out = texts/"new"/"out"
    model, tok = load_base(out/"model.safetensors", "cpu"); assert len(tok) == 400
    prepare(texts/"B.txt", vocab_size=400, data_dir=texts/"other"); (texts/"other"/"tokenizer.json").replace(out/"tokenizer.json")
    with pytest.raises(BadFileError, match="another tokenizer"): load_base(out/"model.safetensors", "cpu")

def test_a_second_run_into_the_folder_is_refused(texts, capsys):
    "Field case 6: with the first one's process; the first comes to its end."
    out, code = texts/"new"/"out", "import sys; from tiny_llm.train import main; main(sys.argv[1:])"
    argv = ["--source", str(texts/"A.txt"), "--out", str(out), *QUICK, "--steps", "100000", "--eval-every", "3"]
    child = subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.PIPE, text=True)
    try:
        while not (out/"state.pt").exists(): assert child.poll() is None; time.sleep(0.05)
        command(texts, "B", code=2)
        assert f"in use by process {child.pid} on" in capsys.readouterr().err
        child.send_signal(signal.SIGINT) # case 44: and Ctrl-C is one honest line
        said = child.communicate()[1].strip().splitlines()
    finally: child.kill()
    assert child.returncode == 130 and len(said) == 1 and said[0].endswith(f"goes on from step {read_state(out/'state.pt')['progress']['step']}, the last validation")
    assert not [p for p in out.rglob(".*")]

def test_stopped_before_the_first_validation(texts, capsys, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(train, "train_step", stop)
    command(texts, "A", code=130)
    assert capsys.readouterr().err.strip().endswith("stopped; nothing was saved, for no validation had come yet")

def test_a_long_text_is_used_whole(texts):
    "Field cases 31 and 32: one novel; the last tenth is held out, and each token is a target once."
    (texts/"A.txt").write_text(" ".join(r["story"].replace("\n", " ") for r in bundled_stories("train")[:60]))
    command(texts, "A", "--seq-len", "64")
    train_ids, valid_ids = (load_ids(s, texts/"new"/"out"/"data") for s in ("train", "valid"))
    assert len(train_ids) == len(valid_ids) == 1 and 0.08 < len(valid_ids[0]) / (len(train_ids[0]) + len(valid_ids[0])) < 0.12
    pieces = train._pieces(train_ids, 64)
    assert [t for p in pieces for t in p[1:].tolist()] == train_ids[0][1:].tolist() and {len(p) for p in pieces} <= {64, 65}
    tokens = read_log(texts/"new"/"out"/"log.jsonl")[1][-1]["tokens"]
    assert tokens > 2 * 300 # two steps of 600, filled well: before, the text was one row of 64

def test_what_was_asked_for_and_is_not_there_is_said(texts, capsys):
    command(texts, "A", "--vocab-size", "9000")
    said = capsys.readouterr()
    assert "note: the text has words for" in said.err and "not for 9,000" in said.err and "some may never have been seen" in said.out

def test_few_stories(texts):
    "Field case 31: a tenth is held out, or as many as one likes."
    for n, how, held in ((150, [], 15), (5, [], 1), (5, ["--n-valid", "3"], 3)):
        (texts/"A.txt").write_text(SEP.join(f"Story {i} of a dog that ran." for i in range(n)))
        command(texts, "A", *how, "--out", str(texts/f"{n}{held}"))
        assert len(load_ids("valid", texts/f"{n}{held}"/"data")) == held
