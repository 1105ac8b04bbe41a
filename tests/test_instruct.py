"Edge cases of tiny_llm.instruct: the notebook shows the straight line, these are the corners."
import csv, gzip, io, json, sys, warnings
import pytest, torch
from tiny_llm.data import ASSETS
from tiny_llm.files import BadFileError
from tiny_llm.data import bundled_stories
import tiny_llm.instruct as ins
from tiny_llm.instruct import (DEEDS, IGNORE, INSTRUCTION_PROMPTS, PLAIN_PROMPTS, gaps, spoken, bucketed_batches, collate, encode_examples,
                               format_example, format_prompt, make_instruction_dataset, make_moral_dataset, read_examples)
from tiny_llm.bpe import EOT, BPETokenizer

@pytest.fixture(scope="module")
def tok(): return BPETokenizer.load(ASSETS/"tokenizer.json")

@pytest.fixture
def read(tmp_path):
    def read(text, name="data.json", **how):
        (path := tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_examples(path, **how)
    return read

def jsonl(*rows): return "\n".join(map(json.dumps, rows))
def talk(*texts, **last):
    "A chat of user and assistant in turn; more fields for its last message."
    messages = [dict(role=r, content=t) for r, t in zip(["user", "assistant"] * len(texts), texts)]
    return dict(messages=[*messages[:-1], {**messages[-1], **last}])

# --- datasets
def test_pairing():
    stories = [f"Story {i}." for i in range(len(PLAIN_PROMPTS) + 3)]
    out = make_instruction_dataset(stories)
    assert out == make_instruction_dataset([{"story": s} for s in stories]) != make_instruction_dataset(stories, seed=1)
    assert all(o.endswith(f"[/INST] {s}") for o, s in zip(out, stories))
    assert len({o.split("[/INST]")[0] for o in out}) == len(PLAIN_PROMPTS)  # all are used before one comes back
    assert make_instruction_dataset([]) == make_moral_dataset([]) == bucketed_batches([], 4) == []
    assert make_instruction_dataset(iter(stories)) == out  # anything that can be looped over

def test_forms_and_plain_prompts():
    assert 50 <= len(INSTRUCTION_PROMPTS) == len(set(INSTRUCTION_PROMPTS)) and not any(gaps(p) for p in PLAIN_PROMPTS)
    assert all(format_prompt(p) == f"[INST] {p}[/INST]" and set(gaps(p)) <= {"words", "theme", "deed"} for p in INSTRUCTION_PROMPTS)
    assert set(DEEDS) == {r["theme"] for r in bundled_stories()}

def test_a_record_is_asked_for_with_its_own_fields():
    ask = lambda **fields: [e.split("[/INST]")[0] for e in make_instruction_dataset([dict(story="A fox.", **fields)] * 100)]
    both, words, theme = ask(words=["fox", "egg"], theme="sharing"), ask(words=["fox", "egg"]), ask(theme="being early")
    assert all("a fox and an egg" in p for p in words) and all("being early" in p for p in theme) and len(set(both)) == len(INSTRUCTION_PROMPTS)
    assert all(("a fox and an egg" in p) + ("sharing" in p) + ("shares" in p) >= 1 for p in both)
    assert ask(words=None, theme=None)[0].removeprefix("[INST] ") in PLAIN_PROMPTS

@pytest.mark.parametrize("words", ["fox", [], 3, [3], ["a", ""], ["[INST]"], {"fox": 1}])
def test_bad_words_are_named(words):
    with pytest.raises(ValueError, match="record 0: field 'words'"): make_instruction_dataset([dict(story="A fox.", words=words)])

@pytest.mark.parametrize("words, said", [(["dog"], "a dog"), (["owl", "milk"], "an owl and milk"), (("dog", "ball", "egg"), "a dog, a ball and an egg")])
def test_spoken(words, said): assert spoken(words) == said

def test_question_before_story():
    assert make_moral_dataset([{"story": " A fox.\n", "moral": "Be kind. "}]) == ["[INST] What is the moral of this story? A fox.[/INST] Be kind."]

@pytest.mark.parametrize("bad, says", [(None, "missing"), (5, "int, not text"), (b"x", "bytes, not text"), (" ", "empty"), ("[INST]", "reserved"), ("\ud800", "surrogates")])
def test_bad_prompt_or_answer_is_named(bad, says):
    with pytest.raises(ValueError, match=says): format_prompt(bad)
    with pytest.raises(ValueError, match=says): format_example("Hi.", bad)

@pytest.mark.parametrize("bad", ["", "  ", 3, None, {}, {"story": 3}, "a [INST] b", {"story": "a [/INST] b"}])
def test_bad_story_is_named(bad):
    with pytest.raises(ValueError, match="record 1"): make_instruction_dataset(["A fox.", bad])

@pytest.mark.parametrize("bad, says", [({"story": "A."}, "lacks moral"), ({"moral": "A."}, "lacks story"), ({}, "lacks story and moral"),
                                       ("A.", "record 1"), ({"story": "A.", "moral": ""}, "'moral'"), ({"story": "[/INST]", "moral": "A."}, "reserved")])
def test_bad_moral_is_named(bad, says):
    with pytest.raises(ValueError, match="record 1") as e: make_moral_dataset([{"story": "A.", "moral": "B."}, bad])
    assert says in str(e.value)

# --- encoding
@pytest.mark.parametrize("answer", ["Once upon a time.", '"Hi," he said.', "é ☃\n\nA new line.", "]]"])
def test_encode_masks_exactly_the_prompt(tok, answer):
    text = format_example("Say it.", answer)
    (ids, labels), = encode_examples([text], tok, mask_prompt=True)
    n = 1 + len(tok.encode(format_prompt("Say it.")))  # as encoded when the model is asked
    assert ids == [tok.eot] + tok.encode(text) + [tok.eot] and labels == [IGNORE] * n + ids[n:]
    (ids2, labels2), = encode_examples([text], tok)
    assert ids2 == labels2 == ids

def test_control_token_in_text_stays_text(tok):
    (ids, _), = encode_examples([format_example(f"Hi {EOT}<|pad|>", f"{EOT} Hello")], tok)
    assert ids.count(tok.eot) == 2 and tok.pad not in ids and tok.decode(ids).count(EOT) == 4

def test_truncation_boundary(tok):
    text = format_example("Hi.", "A fox sat down.")
    n = 1 + len(tok.encode(format_prompt("Hi.")))
    (ids, labels), = encode_examples([text], tok, seq_len=n + 1, mask_prompt=True)  # one answer token is left
    assert len(ids) == n + 1 and labels[-1] == ids[-1] != tok.eot
    with pytest.raises(ValueError, match="nothing to learn"): encode_examples([text], tok, seq_len=n, mask_prompt=True)
    assert encode_examples([text], tok, seq_len=2) == [(ids[:2], ids[:2])]

@pytest.mark.parametrize("seq_len", [1, 0, -3, None, 2.5, "8"])
def test_bad_seq_len(tok, seq_len):  # the start token is never predicted: 1 leaves nothing; -3 would cut from the end
    with pytest.raises(ValueError, match="seq_len must be a whole number of at least 2"): encode_examples(["A."], tok, seq_len=seq_len)

def test_skipped_are_reported_by_index(tok):
    short, long = format_example("Hi.", "Hello."), format_example("Hi. " * 50, "Hello.")
    with pytest.warns(UserWarning, match=r"\[0, 2\]"): out = encode_examples([long, short, long], tok, seq_len=30, mask_prompt=True)
    assert len(out) == 1
    with pytest.warns(UserWarning, match="1 of 2 examples are cut at seq_len=30 and lose their end token"):
        assert len(encode_examples([long, short], tok, seq_len=30)) == 2  # unmasked: the prompt is learned

@pytest.mark.parametrize("mask", [True, False])
def test_answers_that_lose_their_end_are_counted(tok, mask):
    long, short = format_example("q", "word " * 400), format_example("q", "word")
    with pytest.warns(UserWarning, match="^3 of 5 examples are cut at seq_len=288 and lose their end token") as w: out = encode_examples([long] * 3 + [short] * 2, tok, 288, mask)
    assert len(w) == 1 and w[0].filename == __file__ and sum(labels[-1] == tok.eot for _, labels in out) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_examples([short], tok, len(tok.encode(short)) + 2, mask)  # just whole

def test_nothing_to_encode(tok):
    with pytest.raises(ValueError, match="there are no examples"): encode_examples([], tok)
    for text in ("no mark", "[INST] Hi.[/INST]", "[INST] Hi.[/INST]  "):
        with pytest.raises(ValueError, match=r"example 1: no \[/INST\] with an answer"): encode_examples(["[INST] A.[/INST] B.", text], tok, mask_prompt=True)
    with pytest.raises(TypeError, match="a list of examples"): encode_examples("[INST] Hi.[/INST] A fox.", tok)  # not letter by letter

@pytest.mark.parametrize("bad", [None, 5, "", " ", b"x", "half a \ud800 pair"])
def test_bad_example_is_named(tok, bad):
    with pytest.raises(ValueError) as e: encode_examples(["A fox.", bad], tok)
    assert str(e.value).startswith("example 1: ")

@pytest.mark.parametrize("mask", [False, True])
def test_space_around_an_example_is_kept(tok, mask):
    text = " [INST] Hi.[/INST] A fox.\n"
    (ids, _), = encode_examples([text], tok, mask_prompt=mask)
    assert tok.decode(ids) == EOT + text + EOT

def test_tokenizer_without_an_end_token():
    class Foreign:
        def encode(self, text): return [1, 2]
    for bad in (Foreign(), None):
        with pytest.raises(ValueError, match="has no `eot`"): encode_examples(["A fox."], bad)

def test_long_report_is_short(tok):
    short, long = format_example("Hi.", "Hello."), format_example("Hi. " * 50, "Hello.")
    with pytest.warns(UserWarning, match=r"skipped 30 of 31 examples.*\[0, 1, .*, 9, …\]$") as w: encode_examples([long] * 30 + [short], tok, 30, True)
    assert len(w) == 1 and w[0].filename == __file__  # points at the caller
    for n, end in ((10, "9"), (11, "9, …")):
        with pytest.warns(UserWarning, match=rf"skipped {n} of {n + 1} examples.*, {end}\]$"): encode_examples([long] * n + [short], tok, 30, True)

# --- batches
def test_collate_shift_and_padding():
    x, y = collate([([5, 6, 7], [IGNORE, 6, 7]), ([5, 8], [5, 8])], pad_id=1)
    assert x.tolist() == [[5, 6], [5, 1]] and y.tolist() == [[6, 7], [8, IGNORE]] and x.dtype == y.dtype == torch.long
    with pytest.raises(ValueError, match="empty"): collate([], 1)

@pytest.mark.parametrize("ids, labels", [([1, 2, 3], [1, 2]), ([1, 2], [1, 2, 3]), ([1], [1]), ([], [])])
def test_collate_refuses_what_does_not_fit(ids, labels):  # (3, 2) would be broadcast without a word
    with pytest.raises(ValueError, match=f"example 1 has {len(ids)} ids and {len(labels)} labels"): collate([([1, 2], [1, 2]), (ids, labels)], 0)

def test_collate_refuses_a_batch_without_labels():
    for labels in ([IGNORE] * 3, [5, IGNORE, IGNORE]):  # the label of the first token is never used
        with pytest.raises(ValueError, match="NaN"): collate([([5, 6, 7], labels)] * 2, 1)

def test_a_row_without_labels_adds_nothing(tok):
    torch.manual_seed(0)
    table = torch.randn(len(tok), len(tok), requires_grad=True)  # logits of a model that sees one token
    rows = encode_examples([format_example("Hi.", "Hello."), format_example("Say yes.", "Yes.")], tok, mask_prompt=True)
    blank = (rows[1][0], [IGNORE] * len(rows[1][0]))
    def loss(batch):
        x, y = collate(batch, tok.pad)
        return torch.nn.functional.cross_entropy(table[x].flatten(0, 1), y.flatten())
    a, b = loss(rows), loss([blank, rows[0], blank, rows[1]])
    torch.testing.assert_close(a, b)
    (ga,), (gb,) = torch.autograd.grad(a, table), torch.autograd.grad(b, table)
    assert ga.abs().max() > 0
    torch.testing.assert_close(ga, gb)

@pytest.mark.parametrize("seq_len", [14, 20, 24, 30, 256])
@pytest.mark.filterwarnings("ignore:skipped", "ignore:.*lose their end token")
def test_no_batch_is_without_labels(tok, seq_len):
    "Whatever is cut, no batch on the way to the loss can make it NaN."
    texts = [format_example("Hi. " * (i % 7 + 1), "Hello. " * (i % 5 + 1)) for i in range(40)]
    try: encoded = encode_examples(texts, tok, seq_len, mask_prompt=True)
    except ValueError as e: assert "nothing to learn" in str(e) and seq_len == 14; return
    for batch in bucketed_batches(encoded, 1): assert (collate(batch, tok.pad)[1] != IGNORE).any()

def test_pad_id_inside_an_example_is_still_scored():
    assert collate([([0, 1, 0], [0, 1, 0])], pad_id=1)[1].tolist() == [[1, 0]]

@pytest.mark.parametrize("n, size", [(0, 4), (1, 4), (13, 4), (16, 4), (5, 1)])
def test_buckets_hold_each_example_once(n, size):
    data = [([i] * (i * 7 % 40 + 2),) * 2 for i in range(n)]
    batches = bucketed_batches(data, size, seed=3)
    assert sorted(sum(batches, [])) == sorted(data) and all(1 <= len(b) <= size for b in batches)
    assert batches == bucketed_batches(data, size, seed=3)
    assert len(batches) == -(-n // size)

@pytest.mark.parametrize("size", [0, -1, 1.5, None, "4"])
def test_bad_batch_size(size):
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"): bucketed_batches([([1, 2], [1, 2])], size)

@pytest.mark.parametrize("make", [make_instruction_dataset, make_moral_dataset, lambda v: collate(v, 1), lambda v: bucketed_batches(v, 2)])
@pytest.mark.parametrize("bad", [None, 5, "A fox.", b"A fox.", {"story": "A.", "moral": "B."}])
def test_a_list_is_asked_for(make, bad):
    with pytest.raises(TypeError, match=f"a list of (record|example)s is needed, not {type(bad).__name__}"): make(bad)

# --- reader
def test_json_and_jsonl_agree(read):
    rows = [{"instruction": "A", "input": "B", "output": "C"}, {"instruction": "A", "context": None, "response": "C"}, {"story": "A fox."}, {"text": "A fox."}]
    out = read(json.dumps(rows, indent=1))
    assert out == read("\n\n".join(map(json.dumps, rows)) + "\n") == read("\r\n".join(map(json.dumps, rows)))
    assert out[:2] == ["[INST] A\nB[/INST] C", "[INST] A[/INST] C"] and out[2].endswith("[/INST] A fox.")
    assert read(json.dumps(rows[0], indent=1)) == read(b"\xef\xbb\xbf" + json.dumps(rows[0]).encode()) == out[:1]

def test_line_separator_inside_a_string(read):
    assert read('{"story": "A\u2028B", "prompt": "P"}\n{"story": "C", "prompt": "P"}') == ["[INST] P[/INST] A\u2028B", "[INST] P[/INST] C"]

def test_chat(read):
    turn = lambda role, content: {"role": role, "content": content}
    turns = [turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Bye"), turn("assistant", "See you")]
    assert read(json.dumps({"messages": turns})) == ["[INST] Be kind.\nHi[/INST] Hello", "[INST] Be kind.\nHi[/INST] Hello [INST] Bye[/INST] See you"]
    for bad in ([], turns[:1], turns[:2], turns[2:], [turns[1], turns[1]], 5, [5], [{"role": "user"}, turns[2]], [turn("user", None), turns[2]]):
        with pytest.raises(BadFileError, match="line 1"): read(json.dumps({"messages": bad}))

def test_masking_a_conversation_leaves_the_last_answer(read, tok):
    turns = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["Hi", "Hello", "Bye", "See you"])]
    (_, labels), = encode_examples(read(json.dumps({"messages": turns}))[1:], tok, mask_prompt=True)
    assert tok.decode([l for l in labels if l != IGNORE]) == " See you" + EOT

@pytest.mark.parametrize("text, where", [
    ('{"story": "A."}\n{"story": ', "line 2"), ('{"story": "A."}\n\n{"title": "A."}', "line 3"), ('{"story": "A."}\n[1]', "line 2"), ('{"story": "A."}\n5', "line 2"),
    ('[{"story": "A."}, {"story": 5}]', "record 1"), ('[\n{"story": "A."},\n{"story" "B"}]', "line 3"), ("null", "line 1"), ("null\nnull", "line 1"), ("", "no examples"),
    ("[]", "no examples"), ("once upon a time", "line 1"), (b"\xff\xfe\x00", "not UTF-8"), (b'{"story": "caf\xe9"}', "not UTF-8 text (byte 14)"), ('{"instruction": "A", "output": ""}', "line 1"),
    ('{"instruction": 5, "output": "A"}', "line 1"), ('{"instruction": null, "output": "A"}', "line 1"), ('{"instruction": "A", "output": null}', "line 1"),
    ('{"text": null}', "line 1"), ('{"text": "a [/INST] b"}', "line 1"), ('{"story": "A.", "prompt": 5}', "line 1: field 'prompt' is int"), ('{"messages": null}', "line 1"),
    ('{"response": "A"}', "line 1: its fields ['response'] match no layout"), ('{"instruction": "A"}', "line 1: its fields ['instruction'] match no layout"),
    ("5", "line 1: int, not a JSON object"), ('"A fox."', "line 1: str"), ('[{"story": "A."}, 5]', "record 1: int"), ('[{"instruction": "A", "output": "B"}, {"instruction": "A", "output": ["B"]}]', "record 1: field 'output' is list"),
    ('{"instruction": "A", "input": 0, "output": "B"}', "line 1: field 'input' is int"), ('{"story": "\\ud800"}', "line 1: 'utf-8'"), ("[" * 100_000, "nested too deeply"),
    ('{"text": "[INST] a[/INST] "}', "line 1: the answer is empty"), ('{"text": "[INST] [/INST] b"}', "line 1: the prompt is empty"), ('{"text": "[INST] a b"}', "line 1: field 'text' has"), ('{"text": "[INST] a[/INST] b [INST] c"}', "line 1: field 'text' has"),
    ('{"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]}', "the roles are user, assistant, user"),
    ('{"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": ["B"]}]}', "content of message 1 is list")])
def test_bad_files_are_named(read, text, where):
    with pytest.raises(BadFileError, match="Known layouts") as e: read(text)
    assert where in str(e.value) and "data.json" in str(e.value) and "Dolly" in str(e.value)

def test_marked_text_is_checked_and_tidied(read):
    assert read(json.dumps({"text": " [INST]  a\n[/INST]b  [INST] c [/INST] d\n"})) == ["[INST] a[/INST] b [INST] c[/INST] d"]

def test_optional_fields_may_be_empty(read):
    for nothing in (None, "", " \n"):
        assert read(json.dumps({"instruction": "A", "input": nothing, "output": "C"})) == ["[INST] A[/INST] C"]
        assert read(json.dumps({"story": "A fox.", "prompt": nothing})) == read('{"story": "A fox."}')

def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"): read_examples(tmp_path/"none.json")
    with pytest.raises(BadFileError, match="a folder"): read_examples(tmp_path)
    with pytest.raises(TypeError): read_examples(None)

# --- field cases: nothing is dropped without a word
def test_sharegpt_prompt_completion_and_the_fields_beside_them(read):
    pair = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert read(jsonl({"conversations": pair})) == read(jsonl({"prompt": "Hi", "completion": "Hello"})) == read(jsonl(talk("Hi", "Hello"))) == ["[INST] Hi[/INST] Hello"]
    kind = "[INST] Be kind.\nHi[/INST] Hello"
    assert read(jsonl({"conversations": [{"from": "system", "value": "Be kind."}, *pair]})) == read(jsonl({"conversations": pair, "system": "Be kind."})) == [kind]
    assert read(jsonl({"system": "Be kind.", "instruction": "Bye", "output": "See you", "history": [["Hi", "Hello"]]})) == [kind, kind + " [INST] Bye[/INST] See you"]
    for bad in ([["Hi"]], "Hi", [[None, "Hello"]], [["Hi", 5]]):
        with pytest.raises(BadFileError, match="history"): read(jsonl({"instruction": "Bye", "output": "See you", "history": bad}))

def test_a_layout_is_chosen_by_fields_that_are_not_null(read):
    nothing = dict.fromkeys(["messages", "conversations", "response", "story", "prompt", "completion", "text", "system", "history", "weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # null is no dropped field
        assert read(jsonl({**nothing, "instruction": "A", "output": "B"})) == ["[INST] A[/INST] B"]
        assert read(jsonl({**nothing, "instruction": None, "output": None, "prompt": "A", "completion": "B"})) == ["[INST] A[/INST] B"]

def test_what_weighs_nothing_is_read_but_not_learned(read):
    turns = [dict(role="user", content="q"), dict(role="assistant", content="BAD", weight=0), dict(role="user", content="r"), dict(role="assistant", content="good", weight=1)]
    with pytest.warns(UserWarning, match=r"answer of weight 0 is not learned \(1x\)"): assert read(jsonl(dict(messages=turns))) == ["[INST] q[/INST] BAD [INST] r[/INST] good"]
    with pytest.warns(UserWarning, match="not learned"): assert read(jsonl({"instruction": "A", "output": "B", "weight": 0}, talk("q", "a"), talk("s", "t", train=False))) == ["[INST] q[/INST] a"]
    for bad in (0.5, "0", -1, [0]):
        with pytest.raises(BadFileError, match="neither 0 nor 1"): read(jsonl(talk("q", "a", weight=bad)))
    with pytest.raises(BadFileError, match="no examples"): read(jsonl(talk("q", "a", weight=0)))

@pytest.mark.parametrize("field, value", [("tools", [{"name": "f"}]), ("images", ["a.png"]), ("rejected", "no"), ("label", False), ("functions", [1])])
def test_a_field_that_changes_the_meaning_is_refused(read, field, value):
    with pytest.raises(BadFileError, match=f"field '{field}' changes what the answer means"): read(jsonl({"prompt": "A", "completion": "B", field: value}))

def test_a_tool_call_is_refused(read):
    with pytest.raises(BadFileError, match="field 'tool_calls' changes"): read(jsonl(talk("q", "a", tool_calls=[{"id": "1"}])))
    assert read(jsonl({**talk("q", "a", tool_calls=None, audio={}), "tools": []})) == ["[INST] q[/INST] a"]

def test_fields_that_nothing_reads_are_counted_once(read):
    rows = [{"instruction": "A", "output": str(i), "id": i + 1, "category": "x" if i else ""} for i in range(5)]
    with pytest.warns(UserWarning, match=r"data.json: field 'id' is not read \(5x\); field 'category' is not read \(4x\)$") as w: read(jsonl(*rows))
    assert len(w) == 1 and w[0].filename == __file__
    with pytest.warns(UserWarning, match=r"field 'name' is not read \(1x\)"): read(jsonl(talk("q", "a", name="Eva")))

def test_all_bad_records_are_listed_at_once(read):
    rows = [{"instruction": f"q{i}", "output": "" if i % 2 else "a"} for i in range(30)]
    with pytest.raises(BadFileError) as e: read(json.dumps(rows))
    said = str(e.value).splitlines()
    assert said[0].endswith("data.json: 15 records cannot be used") and said[1:11] == [f"record {i}: field 'output' is empty" for i in range(1, 20, 2)]
    assert said[11] == "… and 5 more" and "--skip-bad" in said[12] and "(ShareGPT)" in str(e.value)
    with pytest.warns(UserWarning, match="skipped 15 of 30 records; record 1: field 'output' is empty; record 3"): assert len(read(json.dumps(rows), skip_bad=True)) == 15

def test_lines_that_are_no_json_are_skipped_too(read):
    text = jsonl(talk("q", "a")) + '\n{"story":\n' + '{"x":' * 100_000 + "\n5"
    with pytest.raises(BadFileError, match="3 records cannot be used\nline 2: not valid JSON.*\nline 3: nested too deeply\nline 4: int"): read(text)
    with pytest.warns(UserWarning, match="skipped 3 of 4"): assert read(text, skip_bad=True) == ["[INST] q[/INST] a"]
    with pytest.raises(BadFileError, match="2 records"): read("5\n6", skip_bad=True)  # nothing is left

@pytest.mark.parametrize("number", ["1e999", "1" * 5000, "-1e999", "NaN"])
def test_huge_numbers(read, number):
    with pytest.raises(BadFileError, match="line 1"): read('{"instruction": "A", "output": %s}' % number)

def test_csv_and_gzip(read):
    rows = [["instruction", "input", "output"], ["Name it.", 'A "fox",\nred', "A fox."], ["Say hi.", "", "Hi."]]
    csv.writer(text := io.StringIO(newline="")).writerows(rows)
    want = ['[INST] Name it.\nA "fox",\nred[/INST] A fox.', "[INST] Say hi.[/INST] Hi."]
    data = text.getvalue().encode()
    assert read(data, "a.csv") == read(b"\xef\xbb\xbf" + data, "B.CSV") == read(gzip.compress(data), "a.csv.gz") == want
    assert read("story\tprompt\nA fox.\tTell.\n", "a.tsv") == ["[INST] Tell.[/INST] A fox."]
    assert read(gzip.compress(jsonl(talk("q", "a")).encode()), "a.jsonl.gz") == ["[INST] q[/INST] a"]
    for bad, says in (("a,b\n1,2\n", "line 2: its fields ['a', 'b']"), ("story,story\na,b", "twice"), ("prompt,completion\na,b,c\nd,e", "line 2: 3 fields, but 2 columns"), ('story\n"open', "line 2: not valid CSV"), ("", "no examples"), ("prompt,completion\na,", "line 2: field 'completion' is empty")):
        with pytest.raises(BadFileError) as e: read(bad, "bad.csv")
        assert says in str(e.value)

def test_gzip_that_is_damaged_or_a_bomb(read, monkeypatch):
    data = gzip.compress(jsonl(talk("q", "a")).encode() * 50)
    for bad in (data[:-9], data[:40] + b"xxx" + data[43:], b"\x1f\x8bxx"):
        with pytest.raises(BadFileError, match="gzip file is damaged"): read(bad, "a.gz")
    monkeypatch.setattr(ins, "_MOST", 10_000)
    with pytest.raises(BadFileError, match="more than 10,000 bytes when unpacked"): read(gzip.compress(b" " * 10_001), "a.gz")

@pytest.mark.parametrize("start, says", [(b"PK\x03\x04", "a zip archive or spreadsheet"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), (gzip.compress(gzip.compress(b"x")), "gzip twice")])
def test_other_files_are_called_by_name(read, start, says):
    with pytest.raises(BadFileError, match=f"this is {says}"): read(start)

def test_parquet(read, tmp_path, monkeypatch):
    pa, pq = (pytest.importorskip(m) for m in ("pyarrow", "pyarrow.parquet"))
    rows = [dict(instruction="A", output="B", messages=None), dict(instruction=None, output=None, messages=talk("q", "a")["messages"])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/"x.parquet")
    data = (tmp_path/"x.parquet").read_bytes()
    assert read(data, "a.parquet") == read(gzip.compress(data), "a.gz") == ["[INST] A[/INST] B", "[INST] q[/INST] a"]
    with pytest.raises(BadFileError, match="not a usable Parquet file"): read(data[:-20], "a.parquet")
    monkeypatch.setattr(ins, "_MOST", 50)
    with pytest.raises(BadFileError, match="more than 50 bytes"): read(data, "a.parquet")

def test_parquet_without_its_reader(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BadFileError, match="this is a Parquet file; to read it, install pyarrow"): read(b"PAR1....PAR1", "a.parquet")

def test_a_long_chat_grows_in_a_line_not_in_a_square(read):
    chat = jsonl(talk(*[f"turn {i} " + "word " * 20 for i in range(600)]))
    with pytest.warns(UserWarning, match="oldest turns of a long conversation are left out"): out = read(chat)
    assert len(out) == 300 and sum(map(len, out)) < 300 * 8000 and max(map(len, out)) > 7000
    assert "turn 0 " in out[0] and "turn 0 " not in out[-1] and out[-1].rstrip().startswith("[INST] turn ") and "turn 599 " in out[-1]
    with pytest.warns(UserWarning, match="left out"): short = read(jsonl({**talk(*"abcdef"), "system": "S"}), window=40)
    assert short == ["[INST] S\na[/INST] b", "[INST] S\na[/INST] b [INST] c[/INST] d", "[INST] S\nc[/INST] d [INST] e[/INST] f"]
    with pytest.raises(BadFileError, match="system text alone"): read(jsonl({**talk(*"abcd"), "system": "S" * 50}), window=40)

def test_home_is_expanded(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(jsonl(talk("q", "a"))) == read_examples("~/data.json")

def test_many_texts_are_encoded_as_one_is(tok):
    texts = [format_example(f"Say {i}.", f"{i} it is, <|endoftext|>!") for i in range(1203)]
    assert [ids for ids, _ in encode_examples(texts, tok)] == [[tok.eot, *tok.encode(t), tok.eot] for t in texts]

def test_an_empty_batch_is_named():
    with pytest.raises(ValueError, match="an empty batch"): collate([], 0)

def test_neighbours_in_length_meet_others_with_another_seed():
    encoded = [([i] * (8 + i % 8), [i] * (8 + i % 8)) for i in range(16)]  # lengths 8 to 15: one bucket
    company = lambda seed: {frozenset(ids[0] for ids, _ in b) for b in bucketed_batches(encoded, 4, seed)}
    assert company(0) != company(1) and company(0) == company(0)
