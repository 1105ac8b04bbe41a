"""Fixtures that several files use, and the record of what conformance, fault and fuzz tests measured.

The record is `tiny_llm/assets/peers_log.jsonl`, which the book prints. A test hands its numbers to `record`. They must be
those in the file, or the test fails: the book cannot say what the tests no longer show. `make record` writes them anew.
"""
import pytest, torch
from tiny_llm.data import ASSETS
from tiny_llm.files import read_jsonl, write_jsonl

LOG, NEW = ASSETS/"peers_log.jsonl", {}

def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help=f"write what is measured to {LOG.name}")

def logged():
    "What the record holds: {(kind, what): the whole row}."
    return {(r["kind"], r["what"]): r for r in (read_jsonl(LOG) if LOG.exists() else [])}

@pytest.fixture
def record(request):
    "record(kind, what, **values): the row must be in the record, or goes there with --record."
    def check(kind, what, **values):
        row = NEW[kind, what] = dict(kind=kind, what=what, **values)
        if not request.config.getoption("record"): assert logged().get((kind, what)) == row, "`make record` writes the record anew"
    return check

def pytest_sessionfinish(session):
    if session.config.getoption("record") and NEW: write_jsonl(LOG, [r for _, r in sorted({**logged(), **NEW}.items())])

@pytest.fixture
def one_thread():
    "One thread while a test runs: the order of sums, and so every bit, is then the same in each run."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
