"The numbers of a report against other ways to get them, the statistics against what is known, and judges that misbehave."
import functools, json, math, random, shutil, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np, pytest, torch
from scipy import stats
import tiny_llm.evaluate as ev
from tiny_llm import glance
from tiny_llm.adapter import load_with_lora, save_adapter
from tiny_llm.data import ASSETS, bundled_stories
from tiny_llm.evaluate import (METRICS, OWN, STEPS, SWEEP, Duel, Estimate, OpenAIJudge, Report, Sample, agreement, compare, compare_adapters, copied,
    copy_corpus, difference, distinct, duel, estimate, evaluate, likelihood_judge, main, mentions, own_stories, read_verdict, repeated, rubric,
    rubric_judge, sample_stories, story_nats, story_request, text_values, told_values, tune, write_html)
from tiny_llm.files import read_jsonl
from tiny_llm.finetune import make_instruction_dataset
from tiny_llm.generate import generate, load_base
from tiny_llm.gpt import GPT, GPTConfig, fingerprint, save_checkpoint
from tiny_llm.lora import add_lora_to_model, lora_modules, lora_parameters

@pytest.fixture(scope="module")
def base(): return load_base(device="cpu")

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "An untrained base and two adapters made for it, on disk."
    folder = tmp_path_factory.mktemp("tiny")
    for seed in (0, 1):
        torch.manual_seed(0)
        model = GPT(GPTConfig(d_model=32, n_heads=2, n_layers=2, d_mlp=48)).eval()
        if not seed: save_checkpoint(model, folder/"base.safetensors", tokenizer=load_base()[1].digest())
        add_lora_to_model(model, 2)
        with torch.no_grad(): [m.B.normal_(std=0.5, generator=torch.Generator().manual_seed(seed)) for m in lora_modules(model).values()]
        save_adapter(model, folder/f"adapter{seed}")
    return folder

def small(name, seed, n=30, shift=0.0):
    "A report of made-up numbers."
    rng = np.random.default_rng(seed)
    nats, told = 100 + 20 * np.random.default_rng(9).random(n) + rng.random(n) + shift, [Sample(f"<{i}>", f"a & b {name}", True) for i in range(3)]
    return Report(name, {k: tuple(a.tolist() for a in v) for k, v in text_values("own", nats, np.full(n, 50), np.full(n, 200)).items()}, told)

# Surprise

def test_perplexity_is_that_of_transformers(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tiny_llm.hf import export_base
    model, tok = base
    export_base(model, tok, tmp_path)
    llama, auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts, nats, tokens = [r["story"] for r in bundled_stories("valid")[:12]], 0.0, 0
    for t in texts:
        ids = torch.tensor([[tok.eot, *auto(t, add_special_tokens=False)["input_ids"], tok.eot]])
        with torch.no_grad(): nats += llama(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    ours = story_nats(model, tok, texts)
    assert ours[1].sum() == tokens and abs(math.exp(ours[0].sum() / tokens) - math.exp(nats / tokens)) < 1e-4

def test_each_text_keeps_its_number_in_any_batch(base):
    texts = make_instruction_dataset(bundled_stories("valid")[:5])
    for mask in (False, True):
        together = story_nats(*base, texts, mask)
        alone = [np.concatenate(a) for a in zip(*(story_nats(*base, [t], mask) for t in texts))]
        for a, b in zip(together, alone): np.testing.assert_allclose(a, b, rtol=1e-5)

def test_bytes_are_those_of_what_is_scored(base):
    r = bundled_stories("valid")[0]
    _, tokens, size = story_nats(*base, [r["story"], "Zoë ate a crêpe."])
    assert size.tolist() == [len(r["story"].encode()), 18] and tokens[0] == len(base[1].encode(r["story"])) + 1
    masked = story_nats(*base, [f"[INST] What?[/INST] {r['story']}"], mask_prompt=True)
    assert masked[2][0] == len(" " + r["story"]) and masked[1][0] < story_nats(*base, [f"[INST] What?[/INST] {r['story']}"])[1][0]

def test_nothing_to_score(base):
    long = "[INST] " + "word " * 600 + "[/INST] answer"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="fills the context"): story_nats(*base, [long, "[INST] a[/INST] b"], mask_prompt=True)

def test_the_mode_is_left_as_it_is(base):
    model, tok = base
    story_nats(model.train(), tok, ["A cat."]); assert model.training
    sample_stories(model, tok, ["Tell."], max_new_tokens=2); assert model.training
    model.eval()

# Statistics

def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [(e := estimate(rng.normal(3, 1, 40) * (w := rng.integers(20, 60, 40)), w)).low < 3 < e.high for _ in range(200)]
    assert 0.89 <= np.mean(inside) <= 0.99

def test_interval_is_the_normal_one_where_that_holds():
    v = np.random.default_rng(0).normal(0, 1, 400)
    e = estimate(v)
    assert e.value == pytest.approx(v.mean()) and (e.high - e.low) / 2 == pytest.approx(1.96 * v.std() / 20, rel=0.1)

@pytest.mark.parametrize("k", [0, 3, 60])
def test_shares_get_wilsons_interval(k):
    e, right = estimate([1] * k + [0] * (60 - k)), stats.binomtest(k, 60).proportion_ci(method="wilson")
    assert (e.low, e.high) == pytest.approx((right.low, right.high), abs=1e-4)

def test_too_few():
    with pytest.raises(ValueError, match="1 stories"): estimate([1.0])
    with pytest.raises(ValueError, match="no pairs"): difference([1, 2], [1, 2, 3])

def test_chance_alone_is_found_as_often_as_it_should():
    rng = np.random.default_rng(1)
    p = [difference(*rng.normal(0, 1, (2, 25))).p for _ in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.1

def test_p_is_mcnemars_for_answers_right_and_wrong():
    a, b = np.array([1] * 10 + [0] * 2 + [1] * 20), np.array([0] * 10 + [1] * 2 + [1] * 20)
    assert difference(a, b).p == pytest.approx(stats.binomtest(2, 12).pvalue, abs=0.01) and difference(a, b).value == pytest.approx(-8 / 32)

def test_pairs_see_what_two_intervals_do_not():
    hard = np.random.default_rng(0).normal(0, 10, 50)
    a, b = hard + np.random.default_rng(1).normal(0, 0.1, 50), hard + 0.3
    assert estimate(a).high > estimate(b).low and difference(a, b).p < 0.001 and difference(a, b).low > 0

def test_verdicts_are_corrected_for_their_number():
    first, others = small("base", 0), [small(str(s), s) for s in range(1, 16)]
    c = compare([first, *others])
    assert all(c.verdict(k, i) == "not shown" for k in c.rows for i in range(1, 16))
    raw = [difference(first.values["own"][0], r.values["own"][0]).p for r in others]
    assert all(g.p >= p - 1e-9 for g, p in zip(c.gains["own"], raw))

def test_verdicts_know_which_way_is_better():
    c = compare([small("base", 0), small("up", 1, shift=5), small("down", 2, shift=-5)])
    assert [c.verdict(k, i) for k in ("own", "own bits") for i in (1, 2)] == ["worse", "better"] * 2
    assert c.gains["own"][0].low > 1 > c.gains["own"][1].high

def test_other_tokens_other_perplexity():
    a, b = small("a", 0), small("b", 1, shift=30)
    b.values["own"] = (b.values["own"][0], [40] * 30)
    c = compare([a, b])
    assert c.verdict("own", 1) == "not shown" and c.verdict("own bits", 1) == "worse" and math.isnan(c.gains["own"][0].value)

def test_nothing_in_common():
    with pytest.raises(ValueError, match="no metric in common"): compare([small("a", 0), Report("b", {}, [])])

# What is told

def test_distinct_is_the_share_of_different_runs():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdef", k=rng.randint(3, 30))) for _ in range(20)] + [""]
    for n in (1, 2, 3):
        part, count = distinct(texts, n)
        runs = [tuple(t.split()[i:i + n]) for t in texts for i in range(len(t.split()) - n + 1)]
        assert part.sum() == pytest.approx(len(set(runs))) and count.sum() == len(runs)

def test_repeats(): assert [a.tolist() for a in repeated(["a a a a a a", "a b c d e", ""], 2)] == [[4, 0, 0], [5, 4, 0]]

def test_copied_against_every_run():
    rng = random.Random(0)
    say = lambda n: " ".join(rng.choices("abc", k=n))
    corpus = [say(30) for _ in range(3)]
    for text in (say(25) for _ in range(30)):
        w = text.split()
        slow = max(j - i for i in range(26) for j in range(i, 26) if any(f" {' '.join(w[i:j])} " in f" {c} " for c in corpus))
        assert copied(text, copy_corpus(corpus)) == slow
    assert copied("", copy_corpus(corpus)) == 0 and copied("a b", copy_corpus(["a", "b"])) == 1  # no run goes over the end of a story

def test_words_asked_for():
    assert mentions("The Trains left.", "train") and not mentions("She was training.", "train") and story_request("bee").endswith("a bee.")
    told = [Sample("", "the dog", True), Sample("", "the dog and the cat", False), Sample("", "no", True)]
    v = told_values(told, ["dog", "cat", "bee"], copy_corpus(["the dog"]))
    assert v["asked"][0].tolist() == [1, 1, 0] and v["elsewhere"][0].tolist() == [0.5, 0, 0] and v["copied"][0].tolist() == [2, 2, 0]

@pytest.mark.parametrize("told, things", [([], []), ([Sample("", "a dog", True)], ["dog"]), ([Sample("", "a dog", True)] * 2, ["dog"])])
def test_too_few_stories_told_have_no_score(told, things):
    with pytest.raises(ValueError, match="two at least"): told_values(told, things, "")

def test_stories_are_those_of_generate(base):
    told = sample_stories(*base, ["Tell me a story."], seed=3, max_new_tokens=30)
    assert told[0].text == generate(*base, "[INST] Tell me a story.[/INST]", 30, temperature=0.8, seed=3).strip() and not told[0].stopped

def test_a_story_that_ends(base, monkeypatch):
    eot = base[1].eot
    monkeypatch.setattr(glance, "generate_rows", lambda *a, **k: [base[1].encode(" A cat") + [eot, eot], base[1].encode(" A cat sat.")[:4]])
    told = sample_stories(*base, ["a", "b"])
    assert [s.stopped for s in told] == [True, False] and told[0].text == "A cat"

def test_a_request_that_fills_the_context(base):
    with pytest.raises(ValueError, match="leaves no room"): sample_stories(*base, ["word " * 600])

def test_the_bases_own_stories_need_no_learning(base):
    shipped = [r["story"] for r in read_jsonl(OWN)]
    nats, tokens, _ = story_nats(*base, shipped)
    other = story_nats(*base, make_instruction_dataset(bundled_stories("valid")[:20])) # what an adapter has to learn
    assert nats.sum() / tokens.sum() < other[0].sum() / other[1].sum() - 0.5

# Reports

@pytest.fixture(scope="module")
def compared(tiny):
    own, few = ["A cat sat.", "A dog ran home."], bundled_stories("valid")[:3]
    tok = load_base()[1]
    models = dict(base=load_base(tiny/"base.safetensors")[0], **{f"adapter{i}": load_with_lora(tiny/"base.safetensors", tiny/f"adapter{i}") for i in (0, 1)})
    return compare([evaluate(m, tok, n, few, own, plain=own[::-1], things=["dog", "cat"]) for n, m in models.items()])

def test_a_report_has_every_metric(compared):
    assert all(set(r.values) == set(METRICS) for r in compared.reports) and set(compared.rows) == set(METRICS)
    assert all(e.low <= e.value <= e.high for row in compared.rows.values() for e in row)
    assert all(math.isclose(a, b) for a, b in zip(compared.reports[0].values["own"][0], compared.reports[0].values["plain"][0][::-1]))

def test_reports_survive_json(compared):
    for r in compared.reports: assert Report.from_json(r.to_json()) == r and json.loads(r.to_json())["name"] == r.name

def test_tables_say_the_same(compared):
    page, text = compared._repr_html_(), str(compared)
    for row in compared.rows.values():
        for e in row: assert str(e).replace("<", "&lt;") in page and str(e) in text
    assert compared.reports[1]._repr_html_().count("<tr>") == len(METRICS) + 1

def test_the_page_is_whole_and_escaped(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    c = compare([small("<base>", 0), small("b", 1, shift=5)])
    write_html(c, tmp_path/"a"/"page.html")
    page = (tmp_path/"a"/"page.html").read_text(encoding="utf-8")
    assert "&lt;base&gt;" in page and "a &amp; b" in page and "<base>" not in page and "data:image/png;base64," in page
    assert "src=\"http" not in page and "<script" not in page and not plt.get_fignums()
    monkeypatch.setattr(ev, "table_html", lambda c: 1 / 0)
    before = page
    with pytest.raises(ZeroDivisionError): write_html(c, tmp_path/"a"/"page.html")
    assert (tmp_path/"a"/"page.html").read_text(encoding="utf-8") == before and len(list((tmp_path/"a").iterdir())) == 1

def test_the_command(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ev, "own_stories", lambda model, tok: ["A cat sat.", "A dog ran home."])
    monkeypatch.setattr(ev, "bundled_stories", lambda split: bundled_stories(split)[:3])
    (plain := tmp_path/"plain.txt").write_text("A bee.\n<|endoftext|>\nA fox ran.\n")
    c = main(["--base", str(tiny/"base.safetensors"), "--adapter", str(tiny/"adapter0"), str(tiny/"adapter1"), "--plain", str(plain), "--out", str(tmp_path/"x.html")])
    said = capsys.readouterr().out
    assert [r.name for r in c.reports] == ["base", "adapter0", "adapter1"] and "adapter1" in said and METRICS["plain"].title in said and (tmp_path/"x.html").exists()

@pytest.mark.parametrize("how, says", [(["--adapter", "no/such"], "no/such"), (["--base", "no.safetensors"], "no.safetensors"), (["--plain", "no.txt"], "no.txt")])
def test_bad_input_is_one_line(how, says, capsys, tmp_path):
    with pytest.raises(SystemExit) as e: main([*how, "--out", str(tmp_path/"x.html")])
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count("\n") == 1 and not list(tmp_path.iterdir())

def small_comparison(*a): return compare([small("base", 0), small("b", 1, shift=5)])

def test_the_page_is_probed_before_the_work(tmp_path, monkeypatch, capsys):
    "Field case 29."
    monkeypatch.setattr(ev, "compare_adapters", lambda *a: pytest.fail("worked before it asked"))
    with pytest.raises(SystemExit) as e: main(["--out", str(tmp_path)])
    assert e.value.code == 2 and "is a folder" in capsys.readouterr().err and not list(tmp_path.iterdir())

def test_the_table_is_printed_before_the_page_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ev, "compare_adapters", small_comparison)
    def full(*a): raise OSError("no space left")
    monkeypatch.setattr(ev, "write_html", full)
    with pytest.raises(SystemExit): main(["--out", str(tmp_path/"x.html")])
    said = capsys.readouterr()
    assert METRICS["own"].title in said.out and "no space left" in said.err

def test_what_is_left_out_is_said(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ev, "compare_adapters", small_comparison)
    (tmp_path/"plain.txt").write_text("<|endoftext|>".join(f"Story {i}." for i in range(50)))
    main(["--plain", str(tmp_path/"plain.txt"), "--out", str(tmp_path/"x.html")])
    assert "the first 40 of 50 stories" in capsys.readouterr().out
    a, b = small("a", 0), small("b", 1); b.values["plain"] = b.values["own"]
    with pytest.warns(UserWarning, match="not compared: plain"): compare([a, b])
    monkeypatch.setattr(ev, "generate", lambda *a, **k: ["A cat.", " ", ""])
    with pytest.warns(UserWarning, match="2 of 3 stories"): assert own_stories(None, None, 3) == ["A cat."]

def test_adapters_of_one_name_are_told_apart(tiny, tmp_path, monkeypatch):
    for i in (0, 1): shutil.copytree(tiny/f"adapter{i}", tmp_path/f"run{i}"/"instruct")
    seen = []
    monkeypatch.setattr(ev, "evaluate", lambda model, tok, name, **how: seen.append(name))
    monkeypatch.setattr(ev, "own_stories", lambda *a: []); monkeypatch.setattr(ev, "compare", lambda reports: reports)
    compare_adapters(tiny/"base.safetensors", [tmp_path/"run0"/"instruct", tmp_path/"run1"/"instruct", tiny/"adapter0"])
    assert seen == ["base", str(tmp_path/"run0"/"instruct"), str(tmp_path/"run1"/"instruct"), "adapter0"]

# Training

def test_tune(monkeypatch):
    monkeypatch.setattr(ev, "STEPS", 2); monkeypatch.setattr(ev, "LOOKS", (1, 2))
    start, seen = load_base()[0], []
    lora, _ = tune("LoRA", 5e-3, 0, lambda step, model: seen.append(step))
    full, _ = tune("full", 5e-4, 0)
    assert seen == [1, 2] and not lora.training and not full.training and not lora_modules(full)
    assert fingerprint(lora) == fingerprint(start) != fingerprint(full) and any(m.B.any() for m in lora_modules(lora).values())
    with pytest.raises(ValueError, match="'LoRA' or 'full'"): tune("half", 1e-3, 0)

def test_the_log_is_complete_and_left_as_it_is(tmp_path):
    shutil.copy(ASSETS/"evaluate_log.jsonl", log := tmp_path/"log.jsonl")
    rows = main(["--sweep", str(log)])
    assert log.read_bytes() == (ASSETS/"evaluate_log.jsonl").read_bytes() and len(rows) == len(SWEEP)
    for r in rows:
        assert [c["step"] for c in r["curve"]] == ([0] if r["method"] == "base" else list(ev.LOOKS)) and len(r["answers"]) == len(bundled_stories("valid")) and len(r["own"]) == 40
        for k in ("answers", "own", "plain"): # the sums belong to the numbers of tokens of the base's row
            total = sum(rows[0][k]) / rows[0]["curve"][0][k]
            assert sum(r[k]) / total == pytest.approx(r["curve"][-1][k], abs=1e-3)

@pytest.mark.parametrize("recipe, n", [("base", 0), ("full fine-tune", 0), ("instruct adapter", 12), ("moral adapter", 12)])
def test_recipes(recipe, n, monkeypatch):
    monkeypatch.setattr(ev, "STEPS", 1)
    for job in ("_main_job", "train_moral"): monkeypatch.setattr(ev, job, functools.partial(getattr(ev, job), max_steps=1))
    model, tok = ev._follow(recipe, 1)
    assert len(lora_modules(model)) == n and not model.training and tok.decode(tok.encode("a dog")) == "a dog"
    assert (fingerprint(model) == fingerprint(load_base()[0])) == (recipe != "full fine-tune")
    with pytest.raises(ValueError, match="base, instruct adapter, moral adapter, full fine-tune"): ev._follow("a cake", 0)

def test_the_seeds_are_complete_and_left_as_they_are(tmp_path, base):
    shutil.copy(ASSETS/"seeds_log.jsonl", log := tmp_path/"log.jsonl")
    rows = main(["--seeds", str(log)])
    assert log.read_bytes() == (ASSETS/"seeds_log.jsonl").read_bytes() and [dict(recipe=r["recipe"], seed=r["seed"]) for r in rows] == ev.SEEDS
    nats, tokens, size = story_nats(*base, [r["story"] for r in read_jsonl(OWN)])
    own = rows[0]["values"]["own"]
    np.testing.assert_allclose(own[0], nats, atol=1e-2); assert own[1] == tokens.tolist()
    assert all(rows[0]["values"][k][1] == r["values"][k][1] for r in rows for k in ("answers", "own", "morals")) # the same texts, whoever reads them

# Judges

A, B = [Sample(str(i), "long " * (i + 1), True) for i in range(8)], [Sample(str(i), "long " * 4, True) for i in range(8)]
longer = lambda request, a, b: (len(a) > len(b)) - (len(a) < len(b))

def test_duel_with_a_fair_judge():
    d = duel(longer, A, B)
    assert d.counts() == dict(wins=4, ties=1, losses=3, failed=0) and d.scores() == [0, 0, 0, 0.5, 1, 1, 1, 1] and d.win_rate().value == 4.5 / 8
    assert d.position_bias().value == 0 and d.win_rate().p == pytest.approx(stats.binomtest(4, 7).pvalue)
    other = duel(longer, B, A)
    assert [1 - s for s in other.scores()] == d.scores()

@pytest.mark.parametrize("place", [1, -1])
def test_a_judge_of_places_decides_nothing(place):
    d = duel(lambda *_: place, A, B)
    assert d.counts()["ties"] == 8 and d.position_bias().value == place and d.win_rate().p == 1

def test_a_judge_that_leans():
    rng = random.Random(0)
    lean = lambda request, a, b: 1 if rng.random() < 0.7 else -1
    many = [Sample(str(i), "", True) for i in range(300)]
    e = duel(lean, many, many).position_bias()
    assert e.low < 0.4 < e.high and e.low > 0.25

def test_no_verdict_is_left_out():
    d = Duel([(1, -1), (None, 1), (-1, 1), (1, None), (1, 0)])
    assert d.scores() == [1, None, 0, None, 0.5] and d.counts()["failed"] == 2 and d.win_rate().value == 0.5 and len(d.whole()) == 3

def test_pairs_answer_one_request():
    with pytest.raises(ValueError, match="different stories"): duel(longer, A, B[::-1])

def test_agreement():
    a, b = Duel([(1, -1)] * 5 + [(-1, 1)] * 5), Duel([(1, -1)] * 4 + [(-1, 1)] * 5 + [(1, -1)])
    same, kappa = agreement(a, b)
    assert same.value == 0.8 and kappa == pytest.approx(0.6) and agreement(a, a)[1] == 1
    always = Duel([(0, 0)] * 10)
    assert agreement(a, always)[1] == 0 and math.isnan(agreement(always, always)[1])

def test_likelihood_judge(base):
    judge = likelihood_judge(*base)
    good, bad = "Once upon a time there was a little girl named Lily.", "Time girl once Lily upon little was a there named."
    assert judge("Tell me a story.", good, bad) == 1 and judge("Tell me a story.", bad, good) == -1 and judge("Tell.", good, good) == 0
    assert judge("Tell me a story.", good, "") in (1, -1)  # an empty story is judged too

def test_rubric():
    good = "The duck " + " ".join(f"word{c} went" for c in "abcdefghijklmnopq") + ' away. "Bye."'
    ask = story_request("duck")
    assert all(rubric(ask, good).values())
    for bad, check in ((good.replace("duck", "dog"), "has what was asked for"), ("A duck.", "is 30 words at least"), (good[:-2] + ' and"', "ends with its sentence"),
                       (good[:-1], "closes its quotes"), (good + " the duck ran" * 20 + ".", "repeats little")):
        assert [k for k, ok in rubric(ask, bad).items() if not ok] == [check]
        assert rubric_judge(ask, good, bad) == 1 == -rubric_judge(ask, bad, good)

@pytest.mark.parametrize("text, verdict", [('{"winner": "A"}', 1), ('```json\n{"winner": "B"}\n```', -1), ('{"winner": " Tie "}', 0), ("{}", None), ("[1]", None),
    ('{"winner": 1}', None), ('{"winner": "A"', None), ('{"winner": null}', None), ('I prefer A.', None), ('{"winner": "A"}{"winner": "A"}', None), ("{bad}", None)])
def test_verdicts(text, verdict): assert read_verdict(text) == verdict

@contextmanager
def endpoint(*replies):
    "A server on this machine that gives the replies in turn, the last one for ever: (status, body) or seconds to wait."
    seen, turns = [], list(replies)
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, self.headers["Authorization"], json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            turn = turns.pop(0) if len(turns) > 1 else turns[0]
            if isinstance(turn, float): return time.sleep(turn)  # and closes without a word
            status, body = turn
            self.send_response(status)
            for k, v in (("Content-Type", "application/json"), ("Content-Length", str(len(body.encode())))): self.send_header(k, v)
            if status in (429, 500): self.send_header("Retry-After-Ms", "5")
            self.end_headers(); self.wfile.write(body.encode())
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True); thread.start()
    try: yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally: server.shutdown(); server.server_close(); thread.join()

def said(text): return 200, json.dumps(dict(id="0", object="chat.completion", created=0, model="m", choices=[
    dict(index=0, finish_reason="stop", message=dict(role="assistant", content=text))]))

@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k-123"); monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return pytest.importorskip("openai")

def test_endpoint_judges(key):
    with endpoint(said('{"winner": "A"}'), said('{"winner": "B"}'), said('{"winner": "tie"}')) as (url, seen):
        judge = OpenAIJudge("m", url)
        assert [judge("Tell {x}.", "one {1}", "two") for _ in range(3)] == [1, -1, 0] and not judge.failures
    path, auth, body = seen[0]
    assert path == "/v1/chat/completions" and auth == "Bearer k-123" and body["model"] == "m" and body["temperature"] == 0
    assert "<story_A>one {1}</story_A>" in body["messages"][0]["content"] and "Tell {x}." in body["messages"][0]["content"]

@pytest.mark.parametrize("status", [429, 500])
def test_endpoint_that_is_busy_is_asked_again(key, status):
    with endpoint((status, "{}"), (status, "{}"), said('{"winner": "A"}')) as (url, seen):
        judge = OpenAIJudge("m", url, max_retries=2)
        assert judge("", "a", "b") == 1 and len(seen) == 3 and not judge.failures

@pytest.mark.parametrize("status, why", [(429, "RateLimitError"), (500, "InternalServerError")])
def test_endpoint_that_stays_busy_gives_no_verdict(key, status, why):
    with endpoint((status, "{}")) as (url, seen):
        judge = OpenAIJudge("m", url, max_retries=1)
        assert judge("", "a", "b") is None and len(seen) == 2 and judge.failures == [why]

def test_endpoint_that_is_too_slow(key):
    with endpoint(0.6) as (url, seen):
        judge = OpenAIJudge("m", url, timeout=0.2, max_retries=0)
        assert judge("", "a", "b") is None and judge.failures == ["APITimeoutError"]

def test_endpoint_that_is_not_there(key):
    judge = OpenAIJudge("m", "http://127.0.0.1:9/v1", max_retries=0)
    assert judge("", "a", "b") is None and judge.failures == ["APIConnectionError"]

@pytest.mark.parametrize("body", ["{not json", "[]", "{}", '"text"', "null", '{"choices": []}', '{"choices": [{"message": null}]}', '{"choices": [{"message": {"content": null}}]}',
    '{"choices": [{"message": {"content": 3}}]}', '{"choices": 5}', said("The first, I think.")[1]])
def test_endpoint_that_talks_nonsense(key, body):
    with endpoint((200, body)) as (url, _):
        judge = OpenAIJudge("m", url, max_retries=0)
        assert judge("", "a", "b") is None and len(judge.failures) == 1

def test_a_wrong_key_is_raised(key):
    with endpoint((401, '{"error": {"message": "wrong key"}}')) as (url, seen):
        with pytest.raises(key.AuthenticationError): OpenAIJudge("m", url)("", "a", "b")
        assert len(seen) == 1

def test_a_key_that_the_endpoint_repeats_is_not_shown(key):
    with endpoint((401, '{"error": {"message": "wrong key k-123"}}')) as (url, _):
        with pytest.raises(key.AuthenticationError) as e: OpenAIJudge("m", url)("", "a", "b")
    assert "[key]" in str(e.value) and "k-123" not in str(e.value)

def test_only_what_it_says_is_sent(key):
    with endpoint(said('{"winner": "A"}')) as (url, seen): OpenAIJudge("m", url)("Tell.", "one", "two")
    (_, _, body), = seen
    assert body == dict(model="m", temperature=0, messages=[dict(role="user", content=ev.JUDGE_PROMPT.format(request="Tell.", first="one", second="two"))])

@pytest.mark.parametrize("reply", ['{"winner": "A", "winner": "B"}', '{"winner": ' + "[" * 50_000 + "]" * 50_000 + "}", '{"winner": ' + "1" * 5000 + "}"])
def test_strange_json_is_no_verdict(reply): assert read_verdict(reply) is None

def test_no_key_and_no_package(key, monkeypatch):
    import sys
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(key.OpenAIError, match="OPENAI_API_KEY"): OpenAIJudge("m", "http://127.0.0.1:9/v1")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match="pip install openai"): OpenAIJudge("m")

def test_a_judge_that_fails_sometimes_is_counted(key):
    pair = [Sample("x", "a", True)], [Sample("x", "b", True)]
    many = [p * 6 for p in pair]
    with endpoint(*[said('{"winner": "A"}'), said("{}"), said('{"winner": "A"}'), said('{"winner": "B"}')]) as (url, _):
        judge = OpenAIJudge("m", url, max_retries=0)
        d = duel(judge, *many)
    assert judge.failures == ["no verdict in the reply"] and d.counts() == dict(wins=1, ties=4, losses=0, failed=1)
