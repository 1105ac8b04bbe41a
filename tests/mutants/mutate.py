"""Change a module in many small ways, one at a time, and run its tests: which changes does no test notice?

    python tests/mutants/mutate.py [MODULE ...] [--sample 90] [--minutes 4] [--report]

Mutation tools exist. mutmut 3 forks after it has run the tests once, and torch's threads do not survive that; cosmic-ray
starts a Python for every mutant and rewrites the file in place, and ours is generated. So this is a small one: operators
on the syntax tree, pytest in a child of a process that has imported torch and used nothing of it. Each result is a line
of the log, and a second call goes on where the first stopped. `--report` writes survivors.md.
"""
import argparse, ast, copy, functools, json, math, os, random, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runner import ROOT, copy_package, forked

LOG, REPORT = ROOT/".scratch"/"mutate.jsonl", Path(__file__).with_name("survivors.md")
REASONS = Path(__file__).with_name("reasons.json")  # mutant -> why no test could notice it
PEERS = [f"conformance/test_{t}.py" for t in ("properties", "gradients", "disable", "merge", "keys", "config", "files", "mixed", "targets", "pitfalls")]
TESTS = {"lora": ["test_lora.py", "test_surgery.py", "test_adapter.py"], "adapter": ["test_adapter.py", "test_faults.py"],
         "instruct": ["test_instruct.py"], "finetune": ["test_finetune.py"]}
SLOW = {"lora": PEERS, "adapter": PEERS, "instruct": ["test_fuzz.py"], "finetune": ["test_fuzz.py"]}  # for what survives the others
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
         ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div,
         ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr}

def flip(value): return not value if isinstance(value, bool) else value + 1

def changes(node):
    "Functions that change a copy of `node` in place, or give what replaces it."
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in SWAPS: yield lambda n, i=i: n.ops.__setitem__(i, SWAPS[type(n.ops[i])]())
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS: yield lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not): yield lambda n: n.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)): yield lambda n: ast.Constant(flip(n.value))
    if isinstance(node, (ast.If, ast.IfExp)): yield lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.comprehension) and node.ifs: yield lambda n: setattr(n, "ifs", [])
    if isinstance(node, ast.Return) and node.value is not None: yield lambda n: setattr(n, "value", ast.Constant(None))
    if isinstance(node, (ast.Raise, ast.AugAssign)) or isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield)):
        yield lambda n: ast.Pass()
    if isinstance(node, ast.Assign) and not isinstance(node.targets[0], (ast.Name, ast.Tuple)): yield lambda n: ast.Pass()

def places(tree):
    "(parent, field, index, node) of all that may change: no annotations, no defaults of messages, nothing inside a `raise`."
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns"): continue
        for i, node in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(node, ast.AST): continue
            yield tree, field, i if isinstance(value, list) else None, node
            if not isinstance(node, (ast.Raise, ast.JoinedStr)): yield from places(node)

def put(parent, field, i, node):
    if i is None: setattr(parent, field, node)
    else: getattr(parent, field)[i] = node

def mutants(module):
    "{name: source} of every mutant of a module; the source is made when asked for."
    text = (ROOT/"tiny_llm"/f"{module}.py").read_text(encoding="utf-8")
    tree, lines, found = ast.parse(text), text.splitlines(), {}
    def source(parent, field, i, old, new):
        put(parent, field, i, new)
        made = ast.unparse(ast.fix_missing_locations(tree))
        put(parent, field, i, old)
        return made
    for parent, field, i, node in list(places(tree)):
        for change in changes(node):
            new = change(clone := copy.deepcopy(node)) or clone
            line = lines[getattr(node, "lineno", getattr(parent, "lineno", 1)) - 1].strip()
            name = f"{module}: {line} | {short(node)} -> {short(new)}"
            while name in found: name += "'"
            found[name] = functools.partial(source, parent, field, i, node, new)
    return found

def short(node): return " ".join(ast.unparse(node).split())[:100]

class Watch:
    "Which test failed first."
    first = None
    def pytest_runtest_logreport(self, report): self.first = self.first or (report.failed and report.nodeid) or None
    def pytest_collectreport(self, report): self.first = self.first or (report.failed and f"importing {report.nodeid}") or None

def tested(folder, module, source, tests):
    "Run tests with another source of a module: {by: the first test to fail, or None}."
    import pytest
    copy_package(folder, {f"{module}.py": source})
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    os.chdir(ROOT)
    watch = Watch()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp", *(f"tests/{t}" for t in tests)], plugins=[watch])
    return dict(by=watch.first if code else None, code=int(code))

def outcome(module, source, limit):
    "What notices a mutant: the fast tests, else the slow ones."
    start = time.perf_counter()
    for tests in (TESTS[module], SLOW[module]):
        end = forked(dict(module=module, source=source, tests=tests), tested, limit)
        by = end["by"] if "by" in end else "taking too long"
        if by: break
    return dict(by=by, seconds=round(time.perf_counter() - start, 1))

def sampled(module, n):
    "At most `n` mutants, always the same for the same module, and how many there are in all."
    every = mutants(module)
    return {name: every[name] for name in random.Random(0).sample(sorted(every), min(n, len(every)))}, len(every)

def interval(k, n, z=1.96):
    "Wilson's 95 % interval of a share."
    if not n: return 0.0, 1.0
    middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return middle - half, middle + half

def done(): return {r["name"]: r for r in map(json.loads, LOG.read_text(encoding="utf-8").splitlines())} if LOG.exists() else {}

def work(modules, n, minutes, limit=150):
    "Test the mutants that the log lacks, until the time is up."
    import numpy, peft, regex, pytest, safetensors.torch, tokenizers, torch, torch._dynamo, tqdm.auto, transformers, hypothesis
    until = time.monotonic() + 60 * minutes
    LOG.parent.mkdir(exist_ok=True)
    for module in modules:
        known = done()
        for name, source in sampled(module, n)[0].items():
            if name in known: continue
            if time.monotonic() > until: return print("time is up; the same command goes on")
            row = dict(name=name, **outcome(module, source(), limit))
            with open(LOG, "a", encoding="utf-8") as f: f.write(json.dumps(row) + "\n")
            print("survived" if row["by"] is None else "killed  ", row["seconds"], name, row["by"] or "", flush=True)

def report(modules, n):
    "survivors.md: the score of each module, and each survivor with the reason."
    known, reasons = done(), json.loads(REASONS.read_text(encoding="utf-8")) if REASONS.exists() else {}
    rows, lists = [], []
    for module in modules:
        names, total = sampled(module, n)
        tried = [known[k] for k in names if k in known]
        if not tried: continue
        left = [r["name"] for r in tried if r["by"] is None]
        alike = [k for k in left if reasons.get(k, "").startswith("equivalent")]
        killed, real = len(tried) - len(left), len(tried) - len(alike)
        low, high = interval(killed, real)
        rows.append(f"| {module} | {total} | {len(tried)} | {killed} | {len(alike)} | {killed / real:.0%} | {low:.0%} to {high:.0%} |")
        lists += [f"- `{k}`: {reasons.get(k, 'not looked into')}" for k in left]
    table = ["| module | mutants | sampled | killed | equivalent | score | 95 % interval |", "|---|---|---|---|---|---|---|", *rows]
    head = ["# What no test noticed", "", "Written by `make mutate` from its log and reasons.json. The score leaves equivalent mutants out.", ""]
    REPORT.write_text("\n".join([*head, *table, "", *lists, ""]), encoding="utf-8")

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("modules", nargs="*", default=list(TESTS)), p.add_argument("--sample", type=int, default=90)
    p.add_argument("--minutes", type=float, default=1e9), p.add_argument("--report", action="store_true")
    args = p.parse_args()
    if not args.report: work(args.modules, args.sample, args.minutes)
    report(list(TESTS), args.sample)
