"Fixtures that several files use."
import pytest, torch

@pytest.fixture
def one_thread():
    "One thread while a test runs: the order of sums, and so every bit, is then the same in each run."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
