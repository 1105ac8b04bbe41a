"Edge cases of the corpus: reading, downloading, preparing, batching."
import hashlib
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from collections import Counter
import pytest
import torch

from tiny_llm import data
from tiny_llm.data import bundled_stories, download, get_batch, load_ids, prepare, read_stories, story_batches
from tiny_llm.files import BadFileError
from tiny_llm.bpe import EOT, BPETokenizer


# ---- stories ----

def test_bundled_stories():
    every, splits = bundled_stories(), [bundled_stories(s) for s in ("train", "valid", "test")]
    assert all(set(r) == {"story", "theme", "moral", "words", "split"} and len(r["words"]) in (2, 3) for r in every)
    assert sum(map(len, splits)) == len(every) == len({r["story"] for r in every}) >= 600 and min(map(len, splits)) >= 60
    assert all(min(Counter(r["theme"] for r in s).values()) >= 5 for s in splits) and all(r["story"].isascii() for r in every)
    with pytest.raises(ValueError, match="split"): bundled_stories("dev")


@pytest.mark.parametrize("text, stories", [
    (f"a\n{EOT}\nb\n", ["a", "b"]), (f"{EOT}a{EOT}{EOT} b {EOT}", ["a", "b"]), ("a\r\nb", ["a\nb"]), ("\ufeffa", ["a"]),
    (f"x y{EOT}z", ["x y", "z"]), ("<|endof\ntext|>", ["<|endof\ntext|>"]), ("x" * 1_000_000, ["x" * 1_000_000]),
], ids=["lines", "crowded", "crlf", "bom", "inside a line", "not a mark", "1 MB line"])
def test_read_stories(tmp_path, text, stories):
    (tmp_path / "s.txt").write_bytes(text.encode())
    assert read_stories(tmp_path / "s.txt") == read_stories(tmp_path) == stories


def test_read_stories_errors(tmp_path):
    with pytest.raises(FileNotFoundError): read_stories(tmp_path / "none.txt")
    with pytest.raises(BadFileError, match=r"no \*.txt"): read_stories(tmp_path)
    (tmp_path / "s.txt").write_text(f"\n{EOT}\n  \n")
    with pytest.raises(BadFileError, match="no story"): read_stories(tmp_path)
    (tmp_path / "s.txt").write_bytes(b"caf\xe9 au lait")  # Latin-1
    with pytest.raises(BadFileError, match="s.txt is not UTF-8"): read_stories(tmp_path)


# ---- download ----

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        s = self.server
        if self.path == "/none": return self.send_error(404)
        asked = self.headers["Range"] if s.ranges else None
        start = int(asked[6:-1]) if asked else 0
        if start >= len(s.body): return self.send_error(416)
        self.send_response(206 if asked else 200)
        if s.length: self.send_header("Content-Length", str(len(s.body) - start))
        self.end_headers()
        self.wfile.write(s.body[start:][:s.cut])
        s.sent.append((start, len(s.body[start:][:s.cut])))
    def log_message(self, *args): pass


@pytest.fixture
def server():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.body, s.cut, s.ranges, s.length, s.sent = random.Random(0).randbytes(300_000), None, True, True, []
    s.url, s.sha = f"http://127.0.0.1:{s.server_port}/f", hashlib.sha256(s.body).hexdigest()
    thread = threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield s
    s.shutdown(); s.server_close(); thread.join()


def test_download_once(server, tmp_path):
    for _ in range(2): assert download(server.url, tmp_path / "new" / "f", server.sha).read_bytes() == server.body
    assert len(server.sent) == 1 and [p.name for p in (tmp_path / "new").iterdir()] == ["f"]


def test_download_resumes_until_whole(server, tmp_path):
    server.cut = 100_000
    for _ in range(3):
        with pytest.raises(ConnectionError, match="call again"): download(server.url, tmp_path / "f", server.sha)
        assert not (tmp_path / "f").exists()
    assert download(server.url, tmp_path / "f", server.sha).read_bytes() == server.body
    assert [start for start, _ in server.sent] == [0, 99_999, 199_998, 299_997]


def test_download_without_range_support(server, tmp_path):
    server.ranges = False
    (tmp_path / "f.part").write_bytes(server.body[:1000])
    assert download(server.url, tmp_path / "f", server.sha).read_bytes() == server.body


def test_download_without_length(server, tmp_path):
    server.length = False
    assert download(server.url, tmp_path / "f", server.sha).read_bytes() == server.body


@pytest.mark.parametrize("part", [0, 1, 300_000, 300_001, 400_000])
def test_download_parts_of_any_size(server, tmp_path, part):
    (tmp_path / "f.part").write_bytes((server.body + b"x" * 100_000)[:part])
    assert download(server.url, tmp_path / "f", server.sha).read_bytes() == server.body


def test_download_wrong_part_heals(server, tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 1000)
    with pytest.raises(BadFileError, match="SHA-256"): download(server.url, tmp_path / "f", server.sha)
    assert list(tmp_path.iterdir()) == []
    assert download(server.url, tmp_path / "f", server.sha).read_bytes() == server.body


def test_download_without_checksum_notes_it(server, tmp_path):
    download(server.url, tmp_path / "f")
    assert (tmp_path / "f.sha256").read_text() == server.sha + "\n"
    download(server.url, tmp_path / "f")
    assert len(server.sent) == 1
    (tmp_path / "f").write_bytes(b"damaged")
    assert download(server.url, tmp_path / "f").read_bytes() == server.body


def test_download_replaces_a_damaged_file(server, tmp_path):
    (tmp_path / "f").write_bytes(b"damaged")
    assert download(server.url, tmp_path / "f", server.sha).read_bytes() == server.body


def test_download_errors_name_the_url(server, tmp_path):
    with pytest.raises(ConnectionError, match="/none: .*404"): download(server.url[:-1] + "none", tmp_path / "f")
    with pytest.raises(ConnectionError, match="http://127.0.0.1:1/f"): download("http://127.0.0.1:1/f", tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


# ---- prepare ----

def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_prepare_is_idempotent(tmp_path):
    tok = prepare(data_dir=tmp_path)
    first = contents(tmp_path)
    prepare(data_dir=tmp_path)
    assert contents(tmp_path) == first and set(first) == {"train.bin", "valid.bin", "tokenizer.json"}
    for split in ("train", "valid"):
        assert [tok.decode(s[1:-1]) for s in load_ids(split, tmp_path)] == [r["story"] for r in bundled_stories(split)]


def text_file(folder, n=30):
    folder.mkdir(exist_ok=True)
    (folder / "s.txt").write_text(f"\n{EOT}\n".join(f"Story {i} of a dog." for i in range(n)))
    return folder / "s.txt"


def test_prepare_own_text_with_own_tokenizer(tmp_path):
    source = text_file(tmp_path / "in")
    tok = prepare(source, vocab_size=280, n_valid=5, data_dir=tmp_path / "out")
    assert len(tok) == len(BPETokenizer.load(tmp_path / "out" / "tokenizer.json")) == 280
    train, valid = ([tok.decode(s[1:-1]) for s in load_ids(k, tmp_path / "out")] for k in ("train", "valid"))
    assert len(valid) == 5 and sorted(train + valid) == sorted(read_stories(source))
    prepare(source.parent, vocab_size=280, n_valid=5, seed=1, data_dir=tmp_path / "other")
    assert [tok.decode(s[1:-1]) for s in load_ids("valid", tmp_path / "other")] != valid


def test_prepare_many_stories_in_chunks(tmp_path):
    tok = prepare(text_file(tmp_path / "in", 2500), n_valid=100, data_dir=tmp_path / "out")
    assert len(load_ids("train", tmp_path / "out")) == 2400
    assert all(s[0] == s[-1] == tok.eot for s in load_ids("train", tmp_path / "out"))


@pytest.mark.parametrize("n_valid", [-1, 0, 30, 200])
def test_prepare_n_valid_out_of_range(tmp_path, n_valid):
    with pytest.raises(ValueError, match="there are 30 stories"):
        prepare(text_file(tmp_path / "in"), n_valid=n_valid, data_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prepare_unknown_source_lists_the_choices(tmp_path):
    with pytest.raises(ValueError, match="'tinystory'.*'bundled', 'tinystories', or the path"):
        prepare("tinystory", data_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFileError, match="no \\*.txt"): prepare(tmp_path / "empty", data_dir=tmp_path)


def test_prepare_special_in_text_stays_text(tmp_path):
    source = text_file(tmp_path / "in")
    source.write_text(source.read_text().replace("dog", "<|pad|> dog"))
    tok = prepare(source, n_valid=2, data_dir=tmp_path / "out")
    assert all(tok.pad not in s for s in load_ids("train", tmp_path / "out"))


def test_prepare_tinystories(server, tmp_path, monkeypatch):
    server.body = text_file(tmp_path / "in").read_bytes()
    sha = hashlib.sha256(server.body).hexdigest()
    monkeypatch.setattr(data, "TINYSTORIES", server.url[:-1])
    monkeypatch.setattr(data, "TINYSTORIES_SHA256", {"train.txt": sha, "valid.txt": sha})
    with pytest.raises(ValueError, match="30 stories"): prepare("tinystories", data_dir=tmp_path)
    prepare("tinystories", n_valid=4, data_dir=tmp_path)
    assert len(load_ids("train", tmp_path)) == 30 and len(load_ids("valid", tmp_path)) == 4
    assert len(server.sent) == 2  # each file once, though prepare ran twice


# ---- batches ----

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(data_dir=folder)
    return folder


def test_get_batch(prepared):
    x, y = get_batch("valid", 5, 64, torch.Generator().manual_seed(1), prepared)
    assert x.shape == y.shape == (5, 64) and x.dtype == y.dtype == torch.long and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, get_batch("valid", 5, 64, torch.Generator().manual_seed(1), prepared)[0])


def test_get_batch_longest_window_and_one_more(prepared):
    n = (prepared / "valid.bin").stat().st_size // 2
    x, y = get_batch("valid", 2, n - 1, data_dir=prepared)
    assert x.shape == (2, n - 1) and y[0, -1] == 0
    for bad in (n, 10**9, 0, -1):
        with pytest.raises(ValueError, match="does not fit"): get_batch("valid", 2, bad, data_dir=prepared)


def test_get_batch_reaches_both_ends(tmp_path):
    np.array([0, 5, 6, 0], dtype=np.uint16).tofile(tmp_path / "train.bin")
    x, y = get_batch("train", 200, 2, torch.Generator().manual_seed(0), tmp_path)
    assert {tuple(r) for r in x.tolist()} == {(0, 5), (5, 6)} and {tuple(r) for r in y.tolist()} == {(5, 6), (6, 0)}


def test_unprepared_and_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare"): get_batch("train", 1, 8, data_dir=tmp_path)
    for damage in (b"", b"\0", b"\0\0\5\0\6", b"\0\0\5\0\6\0"):
        (tmp_path / "train.bin").write_bytes(damage)
        with pytest.raises(BadFileError, match="run prepare"): load_ids("train", tmp_path)


def test_data_dir_default(prepared, monkeypatch):
    monkeypatch.setattr(data, "DATA_DIR", prepared)
    assert len(load_ids("valid")) == len(bundled_stories("valid"))


@pytest.mark.parametrize("tokens, seq_len, round_to", [(4096, 512, 32), (1000, 512, 32), (50, 512, 32), (2000, 64, 16)])
def test_story_batches_hold_each_token_once(prepared, tokens, seq_len, round_to):
    stories = load_ids("train", prepared)
    rows = []
    for x, y in story_batches(stories, tokens, seq_len, seed=0, round_to=round_to):
        assert x.shape == y.shape and x.shape[1] % round_to == 0 and (x.numel() <= tokens or len(x) == 1)
        rows += [([t for t, u in zip(a, b) if u != -100], [u for u in b if u != -100]) for a, b in zip(x.tolist(), y.tolist())]
    want = [s[:seq_len + 1].tolist() for s in stories]
    assert sorted(rows) == sorted((s[:-1], s[1:]) for s in want)


def test_story_batches_seed_and_drop_start(prepared):
    stories = load_ids("valid", prepared)
    one, two, other = (list(story_batches(stories, 2048, 512, seed)) for seed in ((0, 1), (0, 1), (0, 2)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two)) and not torch.equal(one[0][0], other[0][0])
    starts = torch.cat([x[:, 0] for x, _ in story_batches(stories, 2048, 512, 0, drop_start=0.5)])
    assert 0.2 < (starts == 0).float().mean() < 0.8
    starts = torch.cat([x[:, 0] for x, _ in story_batches(stories, 2048, 512, 0, drop_start=1.0)])
    assert not (starts == 0).any()


# ---- nothing is left out without a word ----

def test_a_story_that_stands_there_twice_is_on_one_side():
    stories = [f"{i % 50}" for i in range(100)]
    train, valid = data._hold_out(stories, None, 0)
    assert len(set(valid)) == 5 and sorted(train + valid) == sorted(stories) and not set(train) & set(valid)


@pytest.mark.parametrize("text, valid", [("a b", "b"), ("word " * 100, "word " * 10), ("One line.\n" * 20, "One line.\n" * 2), ("ab", None), ("a" * 1000, None)])
def test_one_long_text_gives_its_last_tenth(text, valid):
    if valid is None:
        with pytest.raises(ValueError, match="too short"): data._hold_out([text], None, 0)
    else:
        train, held = data._hold_out([text.strip()], None, 0)
        assert held[0].split() == valid.split() and (train + held)[0].split() + held[0].split() == text.split()


def test_what_is_not_read_is_said(tmp_path):
    for name in ("a.txt", "b.md", "c.TXT", ".d"): (tmp_path / name).write_text("A dog.")
    with pytest.warns(UserWarning, match=r"so not b.md, c.TXT"): assert read_stories(tmp_path) == ["A dog."]
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    with pytest.warns(UserWarning, match="plain text"): read_stories(tmp_path / "a.jsonl")
    with pytest.warns(UserWarning, match="n_valid is not used"): prepare(n_valid=5, data_dir=tmp_path / "out")


def test_prepare_that_is_refused_changes_nothing(tmp_path):
    prepare(data_dir=tmp_path); before = contents(tmp_path)
    def check(tok, new):
        assert len(tok) == 300 and len(load_ids("train", new)) == len(bundled_stories("train"))
        raise ValueError("no")
    with pytest.raises(ValueError, match="^no$"): prepare(vocab_size=300, data_dir=tmp_path, check=check)
    with pytest.raises(ValueError, match="16 bits"): prepare(vocab_size=70_000, data_dir=tmp_path)
    assert contents(tmp_path) == before
