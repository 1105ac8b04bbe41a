"The parts of the chapter on claims that it does not assert."
import shutil
import pytest, torch
from tiny_llm import claims
from tiny_llm.claims import PAIRS, SETTINGS, TOPS, claims_run, directions, energy, main, subspace_overlap
from tiny_llm.data import ASSETS
from tiny_llm.files import read_jsonl

LOG = ASSETS/"claims_log.jsonl"
def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def test_energy_of_known_singular_values():
    s = torch.arange(64, 0, -1).double()
    U, V = (torch.linalg.qr(noise(n, 64, seed=n).double())[0] for n in (96, 70))
    torch.testing.assert_close(energy(U * s @ V.T), (s.square().cumsum(0) / s.square().sum())[[k - 1 for k in TOPS]])
    torch.testing.assert_close(energy(torch.eye(8), (2, 8)), torch.tensor([0.25, 1.0]).double())

def test_energy_of_nothing():
    with pytest.raises(ValueError, match="zero"): energy(torch.zeros(70, 70))

def test_directions_are_those_that_are_read():
    update = noise(40, 3) @ (rows := noise(3, 20, seed=1))
    P = directions(update, 3)
    assert P.shape == (20, 3)
    torch.testing.assert_close(P.T @ P, torch.eye(3).double())
    torch.testing.assert_close(P @ (P.T @ rows.double().T), rows.double().T, atol=1e-4, rtol=1e-4)  # inside their span

@pytest.mark.parametrize("k", [0, -1, 21])
def test_too_many_directions(k):
    with pytest.raises(ValueError, match="1…20"): directions(noise(40, 20), k)

def test_overlap_of_known_planes():
    e = torch.eye(6)
    assert subspace_overlap(e[:, :2], e[:, 2:4]) == 0 and subspace_overlap(e[:, :2], e[:, 1:3]) == 0.5
    assert subspace_overlap(e[:, :1], e[:, :4]) == subspace_overlap(e[:, :4], e[:, :1]) == 1

def test_overlap_depends_on_the_subspace_alone():
    P, Q = (torch.linalg.qr(noise(30, k, seed=k).double())[0] for k in (4, 7))
    turn = torch.linalg.qr(noise(4, 4).double())[0]
    assert subspace_overlap(P @ turn, Q) == pytest.approx(subspace_overlap(P, Q)) == pytest.approx(subspace_overlap(Q, P))
    assert 0 < subspace_overlap(P, Q) < 1

@pytest.mark.parametrize("P, Q", [(torch.eye(4)[:, :2], torch.eye(5)[:, :2]), (torch.eye(4)[0], torch.eye(4)[0]), (torch.eye(4)[:, :2], 2 * torch.eye(4))])
def test_what_is_no_subspace(P, Q):
    with pytest.raises(ValueError, match="shapes|orthonormal"): subspace_overlap(P, Q)

def test_the_log_holds_each_setting_once():
    log = read_jsonl(LOG)
    assert len(log) == len(SETTINGS) and all(sum(s.items() <= row.items() for row in log) == 1 for s in SETTINGS)
    assert {row["pair"] for row in log if row["kind"] == "overlap"} == set(PAIRS)
    for row in log:
        shares = row["overlap"] if row["kind"] == "overlap" else row["energy"]
        assert len(shares) == (4 if row["kind"] == "overlap" else len(TOPS)) and all(0 <= v <= 1 for v in shares)
        if row["kind"] == "loss": assert sorted(shares) == shares and (not 0 < row["r"] <= 64 or shares[-1] == 1)

def test_pairs_of_runs(monkeypatch):
    made = {(r, s): {"a": noise(20, 16, seed=9 * r + s)} for r in (0, 8, 64) for s in range(3)}
    asked = []
    def run(r, alpha, lr, seed):
        asked.append((r, alpha, seed))
        return 1.0, made[r, seed]
    monkeypatch.setattr(claims, "short_run", run)
    found = claims_run("overlap", 2, pair="rank 8 and 64, two seeds")["overlap"]
    assert asked == [(8, 16.0, 2), (64, pytest.approx(2 * 512 ** 0.5), 0)]
    assert found[3] == pytest.approx(subspace_overlap(directions(made[8, 2]["a"], 8), directions(made[64, 0]["a"], 8)), abs=1e-4)

def test_a_complete_log_is_left_as_it_is(tmp_path):
    shutil.copy(LOG, log := tmp_path/"log.jsonl")
    main(["--out", str(log)])
    assert log.read_bytes() == LOG.read_bytes()
