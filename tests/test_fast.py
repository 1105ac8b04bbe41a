"""`tiny_llm.fast` against the plain code: whole losses and gradients, whatever is adapted, and bad input."""
import copy
import pytest, torch, torch.nn.functional as F
from torch.testing import assert_close
from tiny_llm import fast
from tiny_llm.fast import FastLoss, HeadLoss, frozen_weights, keep_memory, product
from tiny_llm.finetune import finetune
from tiny_llm.gpt import GPT, GPTConfig, save_checkpoint
from tiny_llm.instruct import IGNORE
from tiny_llm.lora import add_lora_to_model, lora_parameters
from tiny_llm.train import train_step

CONFIG = GPTConfig(vocab_size=97, max_seq_len=32, d_model=32, n_heads=4, n_layers=3, d_mlp=48)
WHERE = [("attn.qkv", "attn.W_o"), "all-linear", ("mlp.down",), ("blocks.2.attn.qkv",), ("mlp.gate", "attn.W_o")]

def batch(kind="mixed"):
    "Right-padded ids and labels; rows of different lengths, one with a single label."
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randint(0, 97, (4, 20), generator=g) for _ in range(2))
    for row, n in enumerate((20, 13, 7, 2)): y[row, n:], x[row, n:] = IGNORE, 0
    if kind == "few": y[:, :-1] = IGNORE
    return x, y

def plain(model, x, y): return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE)

def tuned(targets, **how):
    torch.manual_seed(0)
    model = add_lora_to_model(GPT(CONFIG), 4, 8, targets, **how).train()
    with torch.no_grad(): [p.normal_(std=0.3) for p in lora_parameters(model)]
    return model

def gradients(loss, params): return [loss.detach(), *torch.autograd.grad(loss, params)]

@pytest.mark.parametrize("targets", WHERE, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "few"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_loss_and_gradients(targets, kind, dtype):
    model = tuned(targets).to(dtype)
    x, y = batch(kind)
    want, got = (gradients(f(x, y), lora_parameters(model)) for f in (lambda x, y: plain(model, x, y), FastLoss(model, dtype)))
    tol = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=1e-6, rtol=1e-5) # the head's sum is fp32
    for a, b in zip(want, got): assert_close(b, a, check_dtype=False, **tol)
    assert all(g.abs().sum() > 0 for g in want)

@pytest.mark.parametrize("chunk", [1, 7, 53, 500])
def test_head_in_chunks_of_any_size(chunk):
    h, W, y = torch.randn(53, 16).requires_grad_(), torch.randn(97, 16), torch.randint(0, 97, (53,))
    want, got = (gradients(l, [h]) for l in (F.cross_entropy(h @ W.T, y), HeadLoss.apply(h, W, y, chunk)))
    for a, b in zip(want, got): assert_close(b, a, atol=1e-5, rtol=1e-4)

def test_full_fine_tuning_tied_and_untied():
    for tie in (True, False):
        model = GPT(GPTConfig(**{**CONFIG.__dict__, "tie_weights": tie})).train()
        x, y = batch()
        want, got = (gradients(f(x, y), list(model.parameters())) for f in (lambda x, y: plain(model, x, y), FastLoss(model)))
        for a, b in zip(want, got): assert_close(b, a, atol=1e-5, rtol=1e-4)

def test_dropout_drops_and_dropped_draws_agree():
    model = tuned(("attn.qkv",), dropout=0.4) # before every row that is left out, so that the draws are the same
    x, y = batch()
    def loss(f, training):
        model.train(training); torch.manual_seed(3)
        return f(x, y).item()
    ours, theirs = FastLoss(model, torch.float32), lambda x, y: plain(model, x, y)
    assert abs(loss(ours, True) - loss(theirs, True)) < 1e-5 and abs(loss(ours, False) - loss(theirs, False)) < 1e-5
    assert loss(ours, True) == loss(ours, True) != loss(ours, False)

def test_bias_and_trained_layers_go_the_ordinary_way():
    layer, x, model = torch.nn.Linear(32, 32), torch.randn(3, 32), GPT(CONFIG).requires_grad_(False)
    assert torch.equal(product(layer, x, frozen_weights(model)), layer(x))
    model.blocks[0].attn.W_o = layer.requires_grad_(False) # a bias would be forgotten
    assert layer not in frozen_weights(model) and torch.equal(product(layer, x, frozen_weights(model)), layer(x))

def test_bfloat16_products_leave_base_and_adapters_in_float32():
    model = tuned(WHERE[0]); before = copy.deepcopy(model.state_dict())
    x, y = batch()
    want, got = (gradients(f(x, y), lora_parameters(model)) for f in (FastLoss(model, torch.float32), FastLoss(model, torch.bfloat16)))
    for a, b in zip(want, got): assert b.dtype == torch.float32 and 0 < (a - b).norm() < 0.25 * a.norm() or a.ndim == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

@pytest.mark.parametrize("hardware", [True, False])
def test_only_float32_becomes_bfloat16(hardware, monkeypatch):
    monkeypatch.setattr(fast, "has_bf16", lambda device: hardware)
    for own in (torch.float16, torch.float32, torch.float64):
        want = torch.bfloat16 if hardware and own == torch.float32 else own
        assert {w.dtype for w in frozen_weights(tuned(WHERE[0]).to(own)).values()} == {want}

def test_no_label_is_an_error():
    x, y = batch()
    with pytest.raises(ValueError, match="no position of this batch has a label"): FastLoss(tuned(WHERE[0]))(x, torch.full_like(y, IGNORE))

def test_never_more_logits_than_a_chunk():
    "The largest matrix with a side of V that the head makes has `chunk` rows."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Watch(TorchDispatchMode):
        rows = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 977: Watch.rows = max(Watch.rows, len(out))
            return out
    h, W, y = torch.randn(600, 16).requires_grad_(), torch.randn(977, 16), torch.randint(0, 977, (600,))
    with Watch(): HeadLoss.apply(h, W, y, 100).backward()
    assert Watch.rows == 100

def test_steps_are_those_of_the_plain_loop():
    def run(how):
        model = tuned(WHERE[0])
        opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
        return [train_step(model, [opt], *batch(), 1e-2, loss_of=how(model)) for _ in range(5)]
    assert_close(run(FastLoss), run(lambda m: None), atol=2e-2 if fast.has_bf16("cpu") else 1e-4, rtol=0)

def test_finetune_uses_it_unless_told(monkeypatch, tmp_path):
    from tiny_llm import finetune as module
    made = []
    monkeypatch.setattr(module, "FastLoss", lambda model: made.append(model) or FastLoss(model))
    data = [f"[INST] Tell me about the {w}[/INST] The {w} is big. The {w} ran home." for w in ("cat", "dog", "cow")]
    plain_run = finetune(None, data, [], tmp_path/"plain", max_steps=3, batch_size=2, fast=False)
    assert not made
    fast_run = finetune(None, data, [], tmp_path/"fast", max_steps=3, batch_size=2)
    assert made == [fast_run.model]
    assert_close(fast_run.losses, plain_run.losses, atol=2e-2 if fast.has_bf16("cpu") else 1e-3, rtol=0)
    with pytest.raises(ValueError, match="fast"): # bits differ, so a state of one is not a state of the other
        def stop(step, loss): raise KeyboardInterrupt
        try: finetune(None, data, [], tmp_path/"half", max_steps=3, batch_size=2, eval_every=1, callback=stop)
        except KeyboardInterrupt: pass
        finetune(None, data, [], tmp_path/"half", max_steps=3, batch_size=2, eval_every=1, fast=False)

def test_keep_memory_says_whether_it_could(monkeypatch):
    assert keep_memory() in (True, False)
    monkeypatch.setattr(fast.ctypes, "CDLL", lambda name: object()) # a C library without mallopt
    assert keep_memory() is False
