"""What noticed each mutant, as a table at the end."""
import pytest

ENDS = []  # (mutant, how its chapter ended)

@pytest.fixture
def noticed(): return ENDS

def pytest_terminal_summary(terminalreporter):
    if not ENDS: return
    terminalreporter.section("mutants")
    for m, end in ENDS:
        where = f"{end['section']}, cell {end['cell']}: {end['error']}, {end['line']}" if "error" in end else "SURVIVED"
        terminalreporter.write_line(f"{m.chapter:16} {m.name:50} {end['seconds']:5.1f} s  {where[:150]}")
