"The parts of the moral task that its chapter does not assert."
import math, random, shutil
import pytest, torch
from tiny_llm.data import ASSETS, bundled_stories
from tiny_llm.files import read_jsonl
from tiny_llm.generate import load_base
from tiny_llm.instruct import make_moral_dataset, format_example
from tiny_llm.moral import MORALS, VARIANTS, bootstrap, calibrated, likeliest_morals, main, moral_pairs, moral_prompt, moral_scores, thinned, wilson

@pytest.mark.parametrize("n", [11, 12, 13, 50, 200])
def test_pairs_are_balanced_and_depend_on_the_seed(n):
    pairs = moral_pairs(n, seed=3)
    counts = [sum(r["moral"] == m for r in pairs) for m in MORALS]
    assert len({r["story"] for r in pairs}) == n and max(counts) - min(counts) <= 1 and pairs == moral_pairs(n, seed=3)
    assert pairs != moral_pairs(n, seed=4) and all(r["split"] == "train" for r in pairs)

@pytest.mark.parametrize("n", [0, -1, 10_000])
def test_too_many_pairs(n):
    with pytest.raises(ValueError, match=f"1 to {len(bundled_stories('train'))}"): moral_pairs(n)

def test_fewer_pairs_are_the_first_of_more(): assert moral_pairs(50, 1)[:25] == moral_pairs(25, 1)

def test_prompts():
    r = bundled_stories()[0]
    assert [format_example(moral_prompt(r["story"]), r["moral"])] == make_moral_dataset([r])
    assert moral_prompt(" A. ", question_first=False).startswith("A. What")

@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_thinned_keeps_whole_sentences_in_order(keep):
    rng = random.Random(0)
    for r in bundled_stories()[:20]:
        rest = r["story"].split()
        for word in (short := thinned(r["story"], keep, rng)).split(): rest = rest[rest.index(word) + 1:]
        assert short and short[-1] in ".!?\"" or short in r["story"]

def test_wilson_against_its_definition():
    for k, n in ((0, 10), (3, 10), (30, 60), (60, 60)):
        for p in wilson(k, n): assert abs(abs(k / n - p) - 1.96 * math.sqrt(p * (1 - p) / n)) < 1e-9  # p is where k/n is 1.96 deviations away

def test_bootstrap_of_known_spread():
    marks = (torch.rand(8, 400, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    mean, low, high = bootstrap(marks)
    assert low < mean < high and mean == pytest.approx(marks.mean().item())
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(3 * 0.21 / 3200), rel=0.35)  # cells, rows and columns all drawn: three times the variance
    low, high = bootstrap((torch.arange(400) < 120).float().expand(8, -1))[1:]  # seeds agree: only the stories vary
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.21 / 400), rel=0.15)

def test_calibration_removes_what_every_story_gets():
    scores = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(calibrated(scores + torch.arange(12.)), calibrated(scores), atol=1e-5, rtol=0)

def test_an_empty_set_has_no_score():
    model, tok = load_base(device="cpu")
    for f, *x in ((moral_scores, model, tok, []), (calibrated, torch.zeros(1, 12)), (bootstrap, torch.zeros(0, 3))):
        with pytest.raises(ValueError, match="no stories|1 stories|no marks"): f(*x)

def test_scores_are_log_probabilities_of_exclusive_answers():
    model, tok = load_base(device="cpu")
    scores = moral_scores(model, tok, bundled_stories("valid")[:2])
    assert scores.shape == (2, 12) and (scores.exp().sum(1) < 1).all()

def test_likeliest_morals_are_the_scores_as_probabilities():
    model, tok = load_base(device="cpu")
    r = bundled_stories("valid")[0]
    p = moral_scores(model, tok, [r])[0].softmax(0)
    guesses = likeliest_morals(model, tok, r["story"], 12)
    assert {m for m, _ in guesses} == set(MORALS) and [q for _, q in guesses] == pytest.approx(sorted(p.tolist(), reverse=True))
    assert all(q == pytest.approx(p[MORALS.index(m)].item()) for m, q in guesses) and likeliest_morals(model, tok, r["story"]) == guesses[:3]

@pytest.mark.parametrize("story, says", [("", "empty"), (" \n", "empty"), ("A dog ran. " * 200, "room for"), ("[INST]", "reserved"), (None, "empty")])
def test_a_story_that_cannot_be_asked_about(story, says):
    with pytest.raises(ValueError, match=says): likeliest_morals(*load_base(device="cpu"), story)

def test_the_command_names_three_morals(capsys):
    main(["Tom had a big cake. He gave half of it to Sue. They both ate, and they both were happy."])
    rows = [line.split("%  ") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 and all(moral in MORALS and 0 <= float(share) <= 100 for share, moral in rows)

@pytest.mark.parametrize("argv", [[""], ["A dog.", "--adapter", "nowhere"], ["--seeds", "0"], ["--out", "."]])
def test_the_command_refuses_in_one_line(argv, capsys):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1

def test_a_complete_log_is_left_as_it_is(tmp_path):
    shutil.copy(ASSETS/"moral_log.jsonl", log := tmp_path/"log.jsonl")
    main(["--out", str(log), "--seeds", "1"])
    assert log.read_bytes() == (ASSETS/"moral_log.jsonl").read_bytes()
    assert {r["name"] for r in read_jsonl(log)} == set(VARIANTS)
