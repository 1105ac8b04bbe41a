"Logs of runs."
import pytest
from tiny_llm.files import BadFileError, log_runs, read_jsonl

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
