"What is counted in a story, at its edges."
import pytest
from tiny_llm.glance import ASKED, MARKS, OPENING, Sample, at_a_glance, glance_rows, loops, mentions, request, words

@pytest.mark.parametrize("text, thing, there", [("Boxes!", "box", True), ("a BOX.", "box", True), ("boxer", "box", False), ("the dog's ball", "dog", False),
    ("", "dog", False), ("dogs", "dog", True), ("a hot dog", "dog", True)])
def test_mentions(text, thing, there): assert mentions(text, thing) is there

@pytest.mark.parametrize("text, opens", [("Once upon a time, a dog ran.", True), ("One day, Tim ran.", True), ("One sunny day, Tim ran.", True), ("There once was a cat.", True),
    ("Once there was a cat.", True), ("There was a cat.", True), ("Onceler ran.", False), ("The dog ran.", False), ("[INST] Once", False), ("", False), ("Long ago, a king", True)])
def test_openings(text, opens): assert bool(OPENING.match(text)) is opens

@pytest.mark.parametrize("text, round_", [("a b c d " * 3, True), ("a b c d " * 2, False), ("go go go go go go", True), ("", False), ("A b, c d. a b c d! a b c D", True)])
def test_loops(text, round_): assert loops(text) is round_

def test_counts_and_rows():
    told = [Sample("", "Once a dog had a ball.", True), Sample("", "No \ufffd.", False)]
    counts = at_a_glance(told, [("dog", "ball"), ("cat",)])
    assert counts == dict(zip(MARKS, [(1, 2), (1, 2), (1, 2), (0, 2), (1, 2)]))
    head, *rows = glance_rows({"a": counts, "b": counts})
    assert head == ["", "a", "b"] and [r[0] for r in rows] == list(MARKS) and rows[0][1].startswith("50% (9% to 91%)")

def test_the_same_requests_for_everybody():
    assert len(ASKED) == len(set(ASKED)) == 96 and request(ASKED[0]) == "Write a story about a dog and a ball."
    assert request(("owl", "milk")) == "Write a story about an owl and milk."
