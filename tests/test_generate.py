"Generation with the shipped base: cache, padding, seeds, limits."
import shutil, warnings
import pytest, torch
from tiny_llm.data import ASSETS
from tiny_llm.files import BadFileError
from tiny_llm.generate import BASE, filter_logits, generate, generate_rows, load_base, sample
from tiny_llm.gpt import GPT, GPTConfig, save_checkpoint
from tiny_llm.bpe import BPETokenizer

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

# Field cases

def test_padding_does_not_count_against_the_context(base):
    "Case 48: each row has the room that it has alone; one that the context ends has not ended by itself."
    model, tok = base
    long = "Once upon a time there was a dog . " * 44
    want = [generate_rows(model, tok, [p], 60, temperature=0)[0] for p in (PROMPTS[0], long)]
    assert [len(row) for row in want] == [60, 27] and tok.eot not in want[1]
    for how in (dict(), dict(padding_side="right"), dict(use_cache=False)):
        assert generate_rows(model, tok, [PROMPTS[0], long], 60, temperature=0, **how) == want

@pytest.mark.parametrize("how, says", [(dict(top_k=0), "top_k=0"), (dict(top_p=0.0), "top_p=0.0"), (dict(top_p=1.5), "top_p=1.5"), (dict(top_p=float("nan")), "top_p=nan"),
    (dict(temperature=-1.0), "temperature=-1.0"), (dict(temperature=1e-46), "temperature=1e-46"), (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=float("inf")), "temperature=inf"), (dict(max_new_tokens=-1), "max_new_tokens=-1")], ids=str)
def test_settings_out_of_range_are_named(base, how, says):
    "Case 49; and the model is in the mode that it was in."
    base[0].train()
    with pytest.raises(ValueError, match=says): generate(*base, "hi", seed=0, **how)
    assert base[0].training
    base[0].eval()

def small(path, rows=4096, **info):
    save_checkpoint(GPT(GPTConfig(vocab_size=rows, max_seq_len=64, d_model=32, n_heads=2, n_layers=1, d_mlp=48)), path, **info)
    return path

def test_a_tokenizer_that_is_only_guessed_is_said(tmp_path):
    "Case 5: without a tokenizer beside a base of one's own."
    with pytest.warns(UserWarning, match="no tokenizer.json beside .*4096 tokens, the model has 8192 rows"): load_base(small(tmp_path/"m.safetensors", 8192), "cpu")
    with pytest.raises(BadFileError, match="300 token rows"): load_base(small(tmp_path/"m.safetensors", 300), "cpu")

def test_a_foreign_tokenizer_is_refused(tmp_path):
    own, shipped = BPETokenizer.train("a dog ran home and a cat", 300), BPETokenizer.load(ASSETS/"tokenizer.json")
    path = small(tmp_path/"m.safetensors", tokenizer=own.digest())
    with pytest.raises(BadFileError, match="another tokenizer"): load_base(path, "cpu")
    shipped.save(tmp_path/"tokenizer.json")
    with pytest.raises(BadFileError, match="another tokenizer"): load_base(path, "cpu")
    own.save(tmp_path/"tokenizer.json")
    assert load_base(path, "cpu")[1].digest() == own.digest()

def test_a_tokenizer_that_is_known_to_be_right_is_taken_in_silence(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (None, BASE, small(tmp_path/"m.safetensors", tokenizer=BPETokenizer.load(ASSETS/"tokenizer.json").digest())): load_base(path, "cpu")
        shutil.copy(ASSETS/"tokenizer.json", tmp_path) # an old checkpoint, which does not say: the one beside it
        load_base(small(tmp_path/"m.safetensors"), "cpu")
