"Text at the edges, all the way: file, examples, ids, training, prompt. What a single step does is in its own test."
import json, time, warnings
import pytest, torch
from tiny_llm.data import ASSETS
from tiny_llm.files import BadFileError
from tiny_llm.finetune import finetune
from tiny_llm.generate import generate, load_base
from tiny_llm.gpt import GPT, GPTConfig, save_checkpoint
from tiny_llm.instruct import IGNORE, encode_examples, format_example, format_prompt, read_examples
from tiny_llm.bpe import EOT, PAD, BPETokenizer

ODD = {"ZWJ": "\U0001F469\u200d\U0001F469\u200d\U0001F467", "flags": "\U0001F1E9\U0001F1EA\U0001F3F3\ufe0f\u200d\U0001F308", "skin": "\U0001F44D\U0001F3FD", "right-to-left": "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d\u0628\u0627",
       "NUL": "a\0b", "carriage return": "a\rb\r\nc", "separators": "a\u2028b\u2029c\x85d\x1ce", "BOM inside": "a\ufeffb", "controls": "a" + "".join(map(chr, range(1, 32))) + "\x7fb", "noncharacters": "a\ufffe\uffff\U0010ffffb",
       "combining": "e" + "\u0301" * 50, "tags": "\U000E0041\U000E0042", "specials": f"a{EOT}b{PAD}c", "nearly special": f"<|endof{EOT}text|>", "lookalike marks": "[inst] [ INST] \uff3bINST\uff3d [/ INST]", "quotes": '"\\\\"\'`{}[]', "one letter": "a"}

@pytest.fixture(scope="module")
def tok(): return BPETokenizer.load(ASSETS/"tokenizer.json")

@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tok):
    "A small untrained base on disk."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")/"tiny.safetensors"
    save_checkpoint(GPT(GPTConfig(max_seq_len=128, d_model=16, n_heads=2, n_layers=1, d_mlp=16)), path, tokenizer=tok.digest())
    return path

@pytest.fixture
def read(tmp_path):
    def read(text):
        (path := tmp_path/"data.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_examples(path)
    return read

# -- file to ids ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_odd_text_goes_through_unchanged(read, tok, text, escaped):
    rows = [{"instruction": f"Say {text}.", "output": f"{text}!"}, {"story": f"Once {text}."}, {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}, {"text": f"[INST] x{text}[/INST] {text}"}]
    out = read("\n".join(json.dumps(r, ensure_ascii=escaped) for r in rows))
    clean = text.strip() # only the space around a field goes
    assert out[0] == f"[INST] Say {text}.[/INST] {text}!" and out[1].endswith(f"[/INST] Once {text}.") and out[2] == f"[INST] {clean}[/INST] {clean}"
    for example, (ids, labels) in zip(out, encode_examples(out, tok, 2000, mask_prompt=True)):
        assert tok.decode(ids) == EOT + example + EOT
        assert ids.count(tok.eot) == 2 and tok.pad not in ids # no text makes a control token
        assert tok.decode([l for l in labels if l != IGNORE]) == example.partition("[/INST]")[2] + EOT

@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\r\n \n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark(read, end, bom):
    rows = [{"instruction": "A", "output": "x\r\ny"}, {"instruction": "B", "output": "z"}]
    assert read(bom + end.join(map(json.dumps, rows)).encode() + end.encode()) == ["[INST] A[/INST] x\r\ny", "[INST] B[/INST] z"]

@pytest.mark.parametrize("text, where", [
    ('{"story": "A."}\n{"story": "A.", "story": "B."}', "line 2: the key 'story' stands twice"), ('{"messages": [{"role": "user", "role": "user", "content": "A"}]}', "line 1: the key 'role' stands twice"),
    ('{"story": "A.", "\\u0073tory": "B."}', "line 1: the key 'story' stands twice"), ('{"a": 1, "story": "A.", "a": 1}', "line 1: the key 'a' stands twice"), ('[{"story": "A."},\n {"story": "B.", "story": "B."}]', "the key 'story' stands twice")])
def test_a_key_that_stands_twice(read, text, where):
    with pytest.raises(BadFileError) as e: read(text)
    assert where in str(e.value)

@pytest.mark.parametrize("field", ["instruction", "input", "output"])
@pytest.mark.parametrize("half", ["\\ud800", "x\\udfff", "\\ude00\\ud83d"])
def test_half_a_surrogate_pair_is_refused_and_a_whole_one_read(read, field, half):
    row = lambda text: "{" + ", ".join(f'"{k}": "{text if k == field else "a"}"' for k in ("instruction", "input", "output")) + "}"
    with pytest.raises(BadFileError, match=f"line 2: .*surrogates"): read(row("b") + "\n" + row(half))
    assert "\U0001F600" in read(row("\\ud83d\\ude00"))[0]

@pytest.mark.parametrize("data", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80"], ids=["no byte", "overlong", "surrogate", "beyond", "cut", "continued"])
def test_bytes_that_are_not_utf8(read, data):
    with pytest.raises(BadFileError, match=r"not UTF-8 text \(byte 12\)"): read(b'{"story": "a' + data + b'"}')

def test_other_encodings_are_refused(read):
    for name in ("utf-16", "utf-16-be", "utf-32"):
        with pytest.raises(BadFileError): read('{"story": "A fox."}'.encode(name))

def test_half_a_surrogate_pair_is_no_text(tok):
    for how in (lambda: tok.encode("a\ud800"), lambda: tok.encode("\udc00", allow_special=True), lambda: tok.encode_batch(["a", "\ud800"]), lambda: format_prompt("a\ud800b")):
        with pytest.raises((UnicodeEncodeError, ValueError, TypeError)): how()

@pytest.mark.parametrize("text", ["x" * 1_000_000, "word " * 200_000, "\U0001F600" * 250_000, " " * 500_000 + "x" * 500_000, "\n" * 999_999 + "x", "\0" * 1_000_000, "ab" * 500_000], ids=["word", "words", "emoji", "spaces", "newlines", "NUL", "pairs"])
def test_a_megabyte_in_one_line(read, tok, text):
    began = time.perf_counter()
    out = read(json.dumps({"instruction": "Say it.", "output": "a" + text}))
    (ids, labels), = encode_examples(out, tok, 256, mask_prompt=True)
    assert len(ids) == len(labels) == 256 and out[0].endswith(text.rstrip()) and time.perf_counter() - began < 10

# -- training ------------------------------------------------------------------------------------------

def test_one_example(tiny, tmp_path):
    result = finetune(tiny, [format_example("Hi.", "Hello.")], [], tmp_path, max_steps=3, batch_size=8)
    assert len(result.losses) == 3 and result.losses[-1] < result.losses[0] and result.valid_losses == []

def test_odd_examples_are_learned_from(tiny, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "1 of 17 examples are cut")
        result = finetune(tiny, [format_example(f"Say {t}.", t) for t in ODD.values()], [format_example("x", EOT)], tmp_path, max_steps=5, batch_size=4, seq_len=120)
    assert all(torch.tensor(result.losses).isfinite()) and len(result.valid_losses) == 2

def test_a_control_token_in_an_example_is_not_trained_on(tiny, tmp_path, tok):
    "The tokens that the run counts are those of the text, written out."
    text = format_example(f"A{EOT}", f"{PAD}B{EOT}")
    assert finetune(tiny, [text], [], tmp_path, max_steps=1).tokens == 1 + len(tok.encode(text)) > len(tok.encode(text, allow_special=True)) + 1

@pytest.mark.parametrize("answer", ["Hello.", "x" * 100_000])
def test_only_examples_that_are_too_long(tiny, tmp_path, answer):
    with pytest.raises(ValueError, match="nothing to learn: none of 2 examples reaches its answer within seq_len=20"):
        finetune(tiny, [format_example("Hi. " * 50, answer)] * 2, [], tmp_path, max_steps=1, seq_len=20)
    assert not any(tmp_path.iterdir())

@pytest.mark.parametrize("bad", [[], [""], [" \n"], [None], ["[INST] a[/INST]"], ["no marks"], ["half \ud800[/INST] x"]])
def test_examples_that_are_none(tiny, tmp_path, bad):
    with pytest.raises((ValueError, TypeError)): finetune(tiny, bad, [], tmp_path, max_steps=1)
    assert not any(tmp_path.iterdir())

# -- prompt --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [*ODD.values(), "", " ", "\n", "\ufeff", EOT, EOT + PAD], ids=[*ODD, "empty", "space", "newline", "BOM", "EOT alone", "EOT and PAD"])
def test_odd_prompts(tiny, text):
    model, tok = load_base(tiny, device="cpu")
    alone = generate(model, tok, text, 4, temperature=0)
    assert isinstance(alone, str)
    assert generate(model, tok, [text, "Once upon a time there was"], 4, temperature=0)[0] == alone # padding is not taken for text

def test_a_control_token_in_a_prompt_is_text(tiny, tok, monkeypatch):
    "The model sees it letter by letter, after the one token that starts every prompt."
    model, seen = load_base(tiny, device="cpu")[0], []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, *rest: seen.append(ids) or forward(ids, *rest))
    generate(model, tok, f"a{EOT}{PAD}b", 1, temperature=0)
    row = seen[0][0].tolist()
    assert row[0] == tok.eot and tok.eot not in row[1:] and tok.pad not in row and tok.decode(row[1:]) == f"a{EOT}{PAD}b"

def test_a_megabyte_as_prompt(tiny, tok):
    model = load_base(tiny, device="cpu")[0]
    with pytest.raises(ValueError, match="leaves no room: the context is 128 tokens"): generate(model, tok, "x" * 1_000_000, 1)

def test_half_a_surrogate_pair_as_prompt(tiny, tok):
    with pytest.raises((UnicodeEncodeError, ValueError, TypeError)): generate(load_base(tiny, device="cpu")[0], tok, "a\ud800", 1)
