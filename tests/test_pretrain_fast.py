"The base's own run, `benchmarks/pretrain.py`: the same loss as the plain model's, and what it does to the stories."
import importlib.util
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from tiny_llm.data import ASSETS
from tiny_llm.gpt import GPT, GPTConfig
from tiny_llm.bpe import BPETokenizer

spec = importlib.util.spec_from_file_location("pretrain_fast", Path(__file__).parents[1]/"benchmarks/pretrain.py")
fast = importlib.util.module_from_spec(spec); spec.loader.exec_module(fast)

@pytest.fixture(scope="module")
def tok(): return BPETokenizer.load(ASSETS/"tokenizer.json")

def arrays(tok, texts): return [np.array([tok.eot, *ids, tok.eot], dtype=np.uint16) for ids in tok.encode_batch(texts)]

def test_the_fast_loss_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(fast.torch, "compile", lambda f, **how: f)  # what is compiled, not the compiler, is tested
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, d_model=32, n_heads=2, n_layers=2, d_mlp=48))
    with torch.no_grad(): [p.mul_(5) for p in model.parameters() if p.ndim > 1]
    x = torch.randint(2, 64, (3, 96)); y = torch.randint(64, (3, 96)); y[0, 50:] = -100
    plain = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)
    plain.backward(); grads = [p.grad.clone() for p in model.parameters()]; model.zero_grad()
    loss = fast.FastLoss(model)
    mine = loss(x, y, rng=np.random.default_rng(0)); mine.backward()
    assert mine.item() == pytest.approx(plain.item(), rel=5e-3)
    assert all((p.grad - g).norm() < 0.05 * g.norm() for p, g in zip(model.parameters(), grads))
    assert abs(loss(x, y, rng=np.random.default_rng(0), dropout=.5).item() - plain.item()) > 1e-3
    assert abs(loss(x, y, rng=np.random.default_rng(0), noise=.5).item() - plain.item()) > 1e-3

def test_every_story_once_in_fixed_shapes(tok):
    stories = arrays(tok, [f"Tim saw {i} dogs." + " He ran." * (i % 60) for i in range(70)])
    seen, shapes = [], set()
    for x, y in fast.batches(stories, 2048, 0, 3, drop_start=0):
        shapes.add(tuple(x.shape))
        seen += [tuple(row[y_ != -100].tolist()) for row, y_ in zip(x, y) if (y_ != -100).any()]
    assert sorted(seen) == sorted(tuple(s[:-1].tolist()) for s in stories)
    assert all(t in fast.WIDTHS and b == 2048 // t for b, t in shapes)

def test_people_are_renamed_alike_through_a_story(tok):
    stories = arrays(tok, ["Tim met Lily. Tim and Lily ran. Tom was sad.", "The dog ran."])
    rename = fast.Renamer(tok, stories)
    told = {tok.decode(fast.swapped(stories[0], rename(stories[0], np.random.default_rng(s)))[1:-1].tolist()) for s in range(8)}
    assert len(told) > 1
    for text in told:
        boy, _, girl, again, _, girl2 = text.replace(".", "").split()[:6]
        assert boy == again and girl == girl2 and boy in fast.BOYS and girl in fast.GIRLS and text.endswith("was sad.")
    told = {tok.decode(fast.swapped(stories[1], rename(stories[1], np.random.default_rng(s)))[1:-1].tolist()) for s in range(8)}
    assert "The dog ran." in told and len(told) > 1 and all(t.startswith("The ") and t.endswith(" ran.") for t in told)

def test_rare_characters_become_plain(): assert fast.plain("\u201cNo\u2026 caf\u00e9 \u2013 it\u2019s \u00bd\U0001f600\u201d") == "\u201cNo... cafe - it\u2019s 12\u201d"

def test_the_lesson_of_teachers(tok, tmp_path, monkeypatch):
    "Stored chances are the models' mean, every place has its own, and a lesson of the right answers alone is the plain loss."
    monkeypatch.setattr(fast.torch, "compile", lambda f, **how: f)
    torch.manual_seed(0)
    stories = arrays(tok, [f"Tim saw {i} dogs." + " He ran." * i for i in range(9)])
    models = [GPT(GPTConfig(vocab_size=len(tok), d_model=32, n_heads=2, n_layers=1, d_mlp=48)).eval() for _ in range(2)]
    lesson = fast.Lesson(tmp_path/"lesson", stories, k=6)
    lesson.write(models, stories, room=256)
    for i, s in enumerate(stories):
        x = torch.from_numpy(s[None, :-1].astype(np.int64))
        with torch.no_grad(): want = (sum(torch.softmax(m(x).float(), -1) for m in models) / 2)[0].topk(6).values
        assert torch.allclose(torch.from_numpy(lesson[i][1].astype(np.float32)), want, rtol=.05)
    x, y, ids, p = next(fast.batches(stories, 1024, 0, 0, lesson=lesson))
    assert ids.shape == p.shape == (*x.shape, 6) and ((p > 0).any(-1) == (y >= 0)).all()
    loss, right = fast.FastLoss(models[0]), torch.zeros_like(ids)
    right[..., 0] = y.clamp_min(0)
    one = torch.zeros_like(p); one[..., 0] = 1
    plain = loss(x, y, rng=np.random.default_rng(0)).item()
    assert loss(x, y, right, one, rng=np.random.default_rng(0)).item() == pytest.approx(plain, rel=1e-3)
    assert loss(x, y, ids, p, rng=np.random.default_rng(0)).item() < plain
