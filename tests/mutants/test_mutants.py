"""Each named mutant makes its own chapter fail, by the chapter's own doing; the chapters as they are run through."""
import pytest
from .chapters import MUTANTS
from .runner import Runner

@pytest.fixture(scope="module")
def run():
    runner = Runner()
    yield runner
    runner.close()

def test_names_differ(): assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 30

@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_is_noticed(mutant, run, noticed):
    end = run(chapter=mutant.chapter, old=mutant.old, new=mutant.new)
    assert "harness" not in end, end["harness"]
    noticed.append((mutant, end))
    assert "error" in end, f"{mutant.chapter} ran to its end and did not notice"
    assert end["error"] == mutant.error and not end["in_mutant"], f"the mutant crashed in place of being noticed: {end}"

@pytest.mark.parametrize("chapter", dict.fromkeys(m.chapter for m in MUTANTS))
def test_unbroken_chapter_runs(chapter, run, noticed):
    "The same runner, nothing broken, as far as the last cell that noticed a mutant."
    assert run(chapter=chapter, until=[end["cell"] for m, end in noticed if m.chapter == chapter and "cell" in end]).keys() == {"seconds"}
