"Edge cases of the tokenizer."
import json
import random

import pytest

from tiny_llm.data import ASSETS, bundled_stories
from tiny_llm.files import BadFileError
from tiny_llm.tokenize import EOT, PAD, BPETokenizer


@pytest.fixture(scope="module")
def tok(): return BPETokenizer.load(ASSETS / "tokenizer.json")


ODD = {
    "empty": "", "space": " ", "spaces": "   a  b   ", "newlines": "\n\n\r\n\r\t\v\f",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🚀", "right-to-left": "שלום עולם مرحبا \u202eabc", "combining": "e\u0301 é ñ n\u0303",
    "control": "".join(map(chr, range(32))) + "\x7f\x80\x9f", "nul": "a\0b", "bom": "\ufeffa", "astral": "\U0010ffff𝔸",
    "curly": "“It’s…” — she said", "cjk": "小さな話。한국어", "specials": f"a{EOT}b {PAD}{PAD}<|endof{EOT}text|>",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_round_trip(tok, text):
    assert tok.decode(tok.encode(text)) == text
    assert tok.decode(tok.encode(text, allow_special=True)) == text
    assert tok.encode_batch([text, "x"]) == [tok.encode(text), tok.encode("x")]


def test_random_unicode_round_trip(tok):
    rng = random.Random(0)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]  # surrogates are not text
    for _ in range(50):
        text = "".join(map(chr, rng.choices(points, k=200)))
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("text", ["a" * 1_000_000, "the big dog " * 90_000], ids=["one word", "one line"])
def test_a_megabyte_without_line_break(tok, text):
    assert tok.decode(tok.encode(text)) == text


def test_specials_are_text_unless_asked_for(tok):
    text = f"x{EOT}y{PAD}"
    assert not {tok.eot, tok.pad} & set(tok.encode(text) + tok.encode_batch([text])[0])
    ids = tok.encode(text, allow_special=True)
    assert ids == tok.encode("x") + [tok.eot] + tok.encode("y") + [tok.pad]
    assert tok.encode(text) == tok.encode(text)  # asking once changes nothing afterwards
    assert not {tok.eot, tok.pad} & set(tok.encode(text))
    assert tok.encode("<|endoftext|", allow_special=True) == tok.encode("<|endoftext|")  # not quite the token


def test_vocab(tok):
    assert len(tok) == len(tok.vocab) == 4096 and sorted(tok.vocab.values()) == list(range(4096))
    assert tok.vocab[EOT] == tok.eot == 0 and tok.vocab[PAD] == tok.pad == 1


@pytest.mark.parametrize("bad", [-1, 4096, 10**9])
def test_unknown_id_is_an_error(tok, bad):
    with pytest.raises(ValueError, match="no token has the id"): tok.decode([5, bad])


def test_decode_takes_lists_arrays_and_tensors(tok):
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    ids = tok.encode("A small dog.")
    assert tok.decode(np.array(ids, dtype=np.uint16)) == tok.decode(torch.tensor(ids)) == "A small dog."
    assert tok.decode([]) == ""


def test_half_a_character_decodes_to_the_replacement_sign(tok):
    assert "\ufffd" in tok.decode(tok.encode("🚀")[:-1])


def test_training_is_deterministic_and_saving_is_faithful(tmp_path):
    texts = [r["story"] for r in bundled_stories("train")]
    BPETokenizer.train(texts, 600).save(tmp_path / "a.json")
    again = BPETokenizer.train(texts, 600)
    again.save(tmp_path / "new" / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "new" / "b.json").read_bytes()
    loaded = BPETokenizer.load(tmp_path / "a.json")
    assert len(loaded) == 600 and loaded.encode_batch(texts) == again.encode_batch(texts)
    text = f"x{EOT}"
    assert loaded.encode(text) == again.encode(text) and loaded.eot not in loaded.encode(text)


def test_small_corpora_and_sizes():
    assert len(BPETokenizer.train([], 300)) == 258  # nothing to merge: bytes and control tokens
    assert len(BPETokenizer.train("aaaa", 4096)) < 4096  # one string is one text
    assert BPETokenizer.train("aaaa", 300).decode(BPETokenizer.train("aaaa", 300).encode("aab")) == "aab"
    with pytest.raises(ValueError, match="258"): BPETokenizer.train(["a"], 257)


def broken_files():
    whole = (ASSETS / "tokenizer.json").read_bytes()
    other = json.loads(whole)
    other["model"] = {"type": "WordLevel", "vocab": {EOT: 0, PAD: 1, "a": 2}, "unk_token": "a"}
    return {"empty": b"", "truncated": whole[:len(whole) // 2], "json": b"{}", "text": b"hello", "bytes": b"\xff\xfe\x00",
            "no pad": whole.replace(b"<|pad|>", b"<|dap|>"), "other model": json.dumps(other).encode()}


@pytest.mark.parametrize("data", broken_files().values(), ids=broken_files().keys())
def test_broken_file(tmp_path, data):
    (tmp_path / "t.json").write_bytes(data)
    with pytest.raises(BadFileError, match="t.json"): BPETokenizer.load(tmp_path / "t.json")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError): BPETokenizer.load(tmp_path / "none.json")


def test_the_digest_is_that_of_what_a_tokenizer_does(tok, tmp_path):
    texts = [r["story"] for r in bundled_stories("train")]
    one, other = BPETokenizer.train(texts, 400), BPETokenizer.train(texts[::2], 400)
    one.save(tmp_path / "t.json")
    (tmp_path / "u.json").write_text(json.dumps(json.loads((tmp_path / "t.json").read_text()), indent=4))  # written in another way
    assert {BPETokenizer.load(tmp_path / f).digest() for f in ("t.json", "u.json")} == {one.digest()}
    assert len({one.digest(), other.digest(), tok.digest()}) == 3
