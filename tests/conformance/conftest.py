"Counts the cases of each group, for the table in the book. One thread, so that every sum has one order; no noise from the peers."
import collections, pytest, torch

RESULTS = collections.defaultdict(list)  # group -> outcomes
NOISE = ["`is_gradient_checkpointing` is deprecated", "`gradient_checkpointing_enable` is deprecated", "`torch.jit.script_method` is deprecated"]

def group_of(nodeid):
    "A file of this folder is a group: test_merge.py -> merge."
    return nodeid.split("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py")

def pytest_runtest_logreport(report):
    if "conformance" in report.nodeid and report.when == "call": RESULTS[group_of(report.nodeid)].append(report.outcome)

def pytest_collection_modifyitems(items):
    for item in items:
        if "conformance" in item.nodeid:
            for text in NOISE: item.add_marker(pytest.mark.filterwarnings(f"ignore:{text}"))

@pytest.fixture(autouse=True, scope="package")
def one_thread_and_quick():
    "No waiting for the disk and no model cards from PEFT: nothing here is a test of them."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda fd: None)
        patch.setattr("peft.PeftModel.create_or_update_model_card", lambda *args: None)
        yield
    torch.set_num_threads(n)
