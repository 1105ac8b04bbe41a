"The shipped base: how well it predicts stories that it never saw."
from pathlib import Path
import pytest
from tiny_llm.data import ASSETS, read_stories
from tiny_llm.gpt import load_checkpoint
from tiny_llm.bpe import BPETokenizer
from tiny_llm.train import default_device, perplexity, read_log

VALID = Path(__file__).resolve().parents[2] / "shared" / "tinystories" / "valid.txt"

@pytest.mark.skipif(not VALID.exists(), reason="the TinyStories sample is not beside this repository")
def test_perplexity_of_the_shipped_base():
    "Whole stories, every token after the first, nothing put before or after."
    model, tok = load_checkpoint(ASSETS / "base.safetensors"), BPETokenizer.load(ASSETS / "tokenizer.json")
    ppl = perplexity(model.to(default_device()), tok, read_stories(VALID))
    print(f"perplexity {ppl:.3f}")
    assert ppl <= 5.4

def test_the_log_that_ships_with_it():
    header, log = read_log(ASSETS / "base_log.jsonl")
    assert header["steps"] == log[-1]["step"]
    assert len(header["stages"]) == log[-1]["stage"] and all(a["tokens"] < b["tokens"] for a, b in zip(log, log[1:]))
    assert {"stage", "step", "tokens", "epoch", "lr", "train_loss", "valid_loss", "seconds"} <= set(log[0])
