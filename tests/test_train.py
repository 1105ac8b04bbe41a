"Pretraining: what a kill, a bad number and a wrong folder must not do."
import os, signal, subprocess, sys, time
import pytest, torch
from tiny_llm.data import prepare
from tiny_llm.files import BadFileError
from tiny_llm.gpt import GPT, GPTConfig, load_checkpoint
from tiny_llm.train import (OPTIMIZERS, PretrainConfig, load_state, make_optimizers, param_groups, perplexity, pretrain, read_state,
                            score_windows, train_step)

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

def test_non_finite_loss_stops_with_the_step(tmp_path, data, monkeypatch):
    import tiny_llm.train as train
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
