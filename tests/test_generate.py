"Generation with the shipped base: cache, padding, seeds, limits."
import pytest, torch
from tiny_llm.generate import filter_logits, generate, generate_rows, load_base, sample

PROMPTS = ["Once upon a time", "Tom and his dog went to the park because", "The"]

@pytest.fixture(scope="module")
def base(): return load_base(device="cpu")

@pytest.fixture(scope="module")
def alone(base): return [generate(*base, p, 30, temperature=0) for p in PROMPTS]

@pytest.mark.parametrize("how", [dict(), dict(padding_side="right"), dict(use_cache=False), dict(padding_side="right", use_cache=False)],
                         ids=["left", "right", "left, no cache", "right, no cache"])
def test_batches_give_the_text_of_single_prompts(base, alone, how):
    assert generate(*base, PROMPTS, 30, temperature=0, **how) == alone

def test_sampled_text_does_not_depend_on_the_cache(base):
    a, b = (generate(*base, "Lily saw", 40, seed=3, use_cache=c) for c in (True, False))
    assert a == b != generate(*base, "Lily saw", 40, seed=4)

def test_stops_at_the_end_of_a_story(base):
    model, tok = base
    texts = generate(model, tok, ["Once upon a time"] * 4, 450, seed=0)
    assert any(len(tok.encode(t)) < 440 for t in texts) and not any("<|endoftext|>" in t for t in texts)

def test_rows_say_what_ended_by_itself(base):
    model, tok = base
    rows = generate_rows(model, tok, ["Once upon a time"] * 4, 450, seed=0, temperature=0.8)
    ended = [tok.eot in row for row in rows]
    assert any(ended) and all(e or len(row) == 450 for e, row in zip(ended, rows))
    assert all(set(row[row.index(tok.eot):]) == {tok.eot} for row in rows if tok.eot in row)
    assert [tok.decode(row).split("<|endoftext|>")[0] for row in rows] == generate(model, tok, ["Once upon a time"] * 4, 450, seed=0)

def test_stays_inside_the_context(base):
    model, tok = base
    prompt = "one two three " * 130
    assert 380 < len(tok.encode(prompt)) < 511
    generate(model, tok, prompt, 1000, temperature=0)
    with pytest.raises(ValueError, match="512"): generate(model, tok, "one two three " * 400)

def test_mode_is_left_as_it_was(base):
    model, tok = base
    for mode in (True, False):
        generate(model.train(mode), tok, "A", 2, seed=0)
        assert model.training == mode

def test_empty(base):
    assert generate(*base, []) == generate_rows(*base, []) == []
    assert isinstance(generate(*base, "", 5, seed=0), str)
    assert generate(*base, "Hi", 0) == ""

def test_top_k_is_greedy_at_one():
    logits = torch.randn(5, 30)
    assert torch.equal(sample(logits, 1.0, top_k=1), logits.argmax(-1))

def test_top_p_keeps_the_smallest_set():
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert [filter_logits(p, top_p=q).isfinite().sum().item() for q in (0.01, 0.39, 0.41, 0.69, 0.71, 1.0)] == [1, 1, 2, 2, 3, 4]

def test_bad_padding_side(base):
    with pytest.raises(ValueError, match="left"): generate(*base, "x", padding_side="middle")
