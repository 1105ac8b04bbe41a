"Counts the cases of each group, for the table in the book."
import collections, pytest

RESULTS = collections.defaultdict(list)  # group -> outcomes

def group_of(nodeid):
    "A file of this folder is a group: test_merge.py -> merge."
    return nodeid.split("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py")

def pytest_runtest_logreport(report):
    if "conformance" in report.nodeid and report.when == "call": RESULTS[group_of(report.nodeid)].append(report.outcome)
