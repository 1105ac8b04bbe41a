"Files that are never half written, folders that have one owner, logs of runs."
import argparse, io, multiprocessing, os, re, sys, time, warnings
import pytest
from tiny_llm import files
from tiny_llm.files import BadFileError, atomic_folder, atomic_path, committed, log_runs, owned, probe, read_jsonl

ctx = multiprocessing.get_context("forkserver")

def test_a_killed_measurement_goes_on(tmp_path):
    made, settings, log = [], [dict(n=n) for n in range(5)], tmp_path/"log"
    def run(n):
        if made == [0, 1, 2] and sitting == 1: raise KeyboardInterrupt
        made.append(n)
        return dict(twice=2 * n)
    sitting = 1
    with pytest.raises(KeyboardInterrupt): log_runs(log, settings, run)
    assert [r["n"] for r in read_jsonl(log)] == [0, 1, 2]
    sitting = 2
    assert [r["twice"] for r in log_runs(log, settings, run)] == [0, 2, 4, 6, 8] and made == [0, 1, 2, 3, 4]

def test_a_bad_line_is_named(tmp_path):
    (tmp_path/"log").write_text('{"n": 1}\n{"n": \n')
    with pytest.raises(BadFileError, match="line 2"): read_jsonl(tmp_path/"log")
    with pytest.raises(BadFileError, match="line 2"): log_runs(tmp_path/"log", [dict(n=2)], dict)
    assert (tmp_path/"log").read_text() == '{"n": 1}\n{"n": \n'

def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError): read_jsonl(tmp_path/"no")

def save_often(folder, name, q):
    "A process that saves two files that agree, for a second."
    end, n, bad = time.time() + 1, 0, 0
    while time.time() < end:
        try:
            with atomic_folder(folder) as tmp: [(tmp/f).write_text(f"{name} {n}") for f in "ab"]
            n += 1
        except OSError: bad += 1
    q.put((n, bad))

def look(folder):
    "The texts of the two files, if no save came between."
    before = files._seen(folder, "ab")
    try: found = {committed(folder, n).read_text() for n in "ab"}
    except FileNotFoundError: return set()
    return found if files._seen(folder, "ab") == before else set()

def test_two_processes_save_into_one_folder(tmp_path):
    "Field case 7, and a reader beside them: each save happens, each look sees one save."
    q, looks = ctx.Queue(), []
    children = [ctx.Process(target=save_often, args=(tmp_path/"f", n, q)) for n in (1, 2)]
    for c in children: c.start()
    while any(c.is_alive() for c in children) and q.qsize() < 2: looks.append(look(tmp_path/"f"))
    ended = [q.get() for _ in children]; [c.join() for c in children]
    assert all(n > 3 and not bad for n, bad in ended) and max(map(len, looks)) == 1
    assert sorted(os.listdir(tmp_path/"f")) == ["a", "b"]

def own_for_ever(folder, q):
    with owned(folder):
        (files._temporary(folder)).write_text("half")
        q.put(1); time.sleep(60)

def test_a_folder_has_one_owner(tmp_path):
    q = ctx.Queue(); child = ctx.Process(target=own_for_ever, args=(tmp_path/"f", q)); child.start(); q.get()
    (tmp_path/"f"/".theirs.1.tmp").write_text("another's")
    with pytest.raises(FileExistsError, match=rf"process {child.pid} on .*started 20\d\d-"):
        with owned(tmp_path/"f"): pass
    child.kill(); child.join()
    with owned(tmp_path/"f"):
        with owned(tmp_path/"f"): pass # the same thread may
        assert sorted(os.listdir(tmp_path/"f")) == [".lock", ".theirs.1.tmp"] # what the dead one left is gone, and nothing else

def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path):
    with pytest.raises(ValueError):
        with owned(tmp_path/"a"/"b"): raise ValueError
    assert os.listdir(tmp_path) == []
    (tmp_path/"a").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        with owned(tmp_path/"a"): pass

@pytest.mark.parametrize("text", ["", "no JSON", "[1]", '{"process": "*/../..", "mark": "*"}'])
def test_a_strange_lock_file_is_taken_over(tmp_path, text):
    (tmp_path/".lock").write_text(text); (tmp_path/".a.tmp").touch()
    with owned(tmp_path): pass
    assert os.listdir(tmp_path) == [".a.tmp"]

def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(*a): raise OSError(38, "Function not implemented")
    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="without locks"):
        with atomic_folder(tmp_path) as tmp: (tmp/"a").touch()
    assert os.listdir(tmp_path) == ["a"]

# What the system is used to

def test_the_umask_decides_who_may_read(tmp_path):
    "Field case 19; a file that is replaced keeps its rights."
    old = os.umask(0o027)
    try:
        with atomic_path(tmp_path/"a") as tmp: tmp.touch(mode=0o600)
        with atomic_folder(tmp_path/"f") as tmp: (tmp/"a").touch(mode=0o600)
        (tmp_path/"a2").touch(); (tmp_path/"a2").chmod(0o604)
        with atomic_path(tmp_path/"a2") as tmp: tmp.touch()
    finally: os.umask(old)
    assert [(tmp_path/p).stat().st_mode & 0o777 for p in ("a", "f/a", "a2")] == [0o640, 0o640, 0o604]

def test_links_are_written_through_and_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path)); (tmp_path/"real").mkdir(); (tmp_path/"link").symlink_to("real/a")
    with atomic_path("~/link") as tmp: tmp.write_text("new")
    assert (tmp_path/"link").is_symlink() and (tmp_path/"real/a").read_text() == "new"
    with atomic_folder("~/f") as tmp: (tmp/"a").touch()
    assert (tmp_path/"f/a").exists()

@pytest.mark.parametrize("path, error", [("folder", IsADirectoryError), ("file/x", NotADirectoryError), ("/dev/null", OSError), ("n" * 300, OSError)])
def test_an_output_that_cannot_be_written_is_found_at_once(tmp_path, path, error):
    (tmp_path/"folder").mkdir(); (tmp_path/"file").touch()
    with pytest.raises(error, match=re.escape(path)): probe(tmp_path/path)
    probe(tmp_path/"new"/"x"); assert sorted(os.listdir(tmp_path)) == ["file", "folder"]

# JSON of people

def test_odd_lines(tmp_path):
    (tmp_path/"a").write_bytes(b'\xef\xbb\xbf{"t": "one\xe2\x80\xa8two"}\r\n\n[1]')
    assert read_jsonl(tmp_path/"a") == [{"t": "one\u2028two"}, [1]]
    for bad in (b"\xff", b"[" * 100_000, b"1" * 5000):
        (tmp_path/"a").write_bytes(b"1\n" + bad)
        with pytest.raises(BadFileError, match="line 2"): read_jsonl(tmp_path/"a")

def test_a_log_is_only_added_to(tmp_path):
    (log := tmp_path/"log").write_text('{"n": 0, "x": 0}') # no end of line, and another process beside us
    def run(n):
        with open(log, "a") as f: f.write('\n{"n": 2, "x": 0}\n')
        return dict(x=n)
    assert log_runs(log, [dict(n=n) for n in range(3)], run) == [dict(n=0, x=0), dict(n=2, x=0), dict(n=1, x=1)]

def test_a_log_that_cannot_be_written_is_found_before_the_first_run(tmp_path):
    with pytest.raises(IsADirectoryError): log_runs(tmp_path, [dict(n=1)], lambda n: 1 / 0)
    (tmp_path/"log").write_text("[1]\n")
    with pytest.raises(BadFileError, match="no log"): log_runs(tmp_path/"log", [dict(n=1)], lambda n: 1 / 0)

# Commands

def test_any_console_shows_what_it_can(monkeypatch):
    "Field case 43."
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    with files._command(argparse.ArgumentParser(prog="x")): print("狐 fox"); warnings.warn("鶏")
    for s, said in ((sys.stdout, b"? fox\n"), (sys.stderr, b"note: ?\n")): s.flush(); assert s.buffer.getvalue() == said

@pytest.mark.parametrize("error, code, says", [(ValueError("no\nno"), 2, "x: error: no\nno\n"), (OSError("disk"), 2, "x: error: disk\n"), (KeyboardInterrupt(), 130, "\nx: stopped; all is saved\n")])
def test_commands_end_alike(capsys, error, code, says):
    with pytest.raises(SystemExit) as e:
        with files._command(argparse.ArgumentParser(prog="x"), lambda: "all is saved"): raise error
    assert e.value.code == code and capsys.readouterr().err == says
