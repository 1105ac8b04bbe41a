"""Run a chapter with one of its ideas broken, and say which cell notices.

The notebook's own cell is changed, and so is the module it is exported to, in a copy of the package that comes first on
the path. Each run is a process of its own. They are forked from one that has imported torch and nothing of ours, so a
run costs what its cells cost. `Runner` is used from outside; this file as a script is that one process.
"""
import json, os, re, signal, subprocess, sys, tempfile, time, traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds for one chapter

def cells(chapter):
    "(id, section, source) of the code cells of a chapter that run."
    section, found = "", []
    for c in json.loads((ROOT/"nbs"/f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(c["source"])
        if c["cell_type"] == "markdown": section = source.removeprefix("## ") if source.startswith("## ") else section
        elif "#| eval: false" not in source: found.append((c["id"], section, source))
    return found

def exported(source): return re.search(r"^#\| *exports?\b", source, re.M)
def body(source): return "\n".join(l for l in source.splitlines() if not l.startswith("#|")).strip("\n")

def changed(chapter, old, new):
    "(id, old source, new source) of the one exported cell that holds `old`. Raises ValueError where a mutant is out of date."
    hits = [(id, s) for id, _, s in cells(chapter) if exported(s) and old in s]
    if len(hits) != 1 or hits[0][1].count(old) != 1: raise ValueError(f"stale mutant: {chapter} exports {old!r} not exactly once")
    (id, source), = hits
    compile(body(mutated := source.replace(old, new)), chapter, "exec")  # a mutant must be a program, else anything catches it
    return id, source, mutated

def module_with(old, new):
    "{file name: new text} of the one module that holds `old`. Raises ValueError where the package is not that of the notebooks."
    texts = {p.name: p.read_text(encoding="utf-8") for p in (ROOT/"tiny_llm").glob("*.py")}
    hits = [name for name, text in texts.items() if text.count(old) == 1]
    if len(hits) != 1: raise ValueError(f"run `make export`: the package holds {old[:60]!r} not exactly once")
    return {hits[0]: texts[hits[0]].replace(old, new)}

def copy_package(folder, texts):
    "The package in `folder`, with some files of other text. The others are links."
    (folder/"tiny_llm").mkdir()
    for p in (ROOT/"tiny_llm").iterdir():
        if p.name in texts: (folder/"tiny_llm"/p.name).write_text(texts[p.name], encoding="utf-8")
        elif p.name != "__pycache__": (folder/"tiny_llm"/p.name).symlink_to(p)

def run(folder, chapter, old=None, new=None, until=()):
    "Run the cells to the first error: what it was and where. No error: {}. After the last cell of `until` nothing runs."
    from execnb.shell import CaptureShell
    id, source, mutated = changed(chapter, old, new) if old else (None, "", "")
    copy_package(folder, module_with(body(source), body(mutated)) if old else {})
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    shell = CaptureShell(folder/"chapter.ipynb")
    todo = cells(chapter)
    last = max((i for i, (cell, *_) in enumerate(todo) if cell in until), default=len(todo))
    for cell, section, text in todo[:last + 1]:
        shell.run(mutated if cell == id else text)
        if e := shell.exc:
            line = next((f.line for f in reversed(traceback.extract_tb(e.__traceback__)) if f.name == "<module>"), "")
            said = (str(e).strip() or "?").splitlines()[0]
            return dict(cell=cell, section=section, error=type(e).__name__, line=line, said=said, in_mutant=cell == id)
    return {}

def forked(task, run, limit):
    "`run(folder, **task)` in a child of at most `limit` seconds: its answer, or {harness: what went wrong with the run itself}."
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        if (pid := os.fork()) == 0:
            os.setsid(), signal.alarm(limit)
            quiet = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2): os.dup2(quiet, stream)
            try: answer = run(Path(folder), **task)
            except BaseException as e: answer = dict(harness=f"{type(e).__name__}: {e}")
            os.write(write, json.dumps(answer).encode())
            os._exit(0)
        os.close(write)
        os.waitpid(pid, 0)
        try: os.killpg(pid, signal.SIGKILL)  # what the child may have started
        except ProcessLookupError: pass
        with os.fdopen(read) as f: said = f.read()
    return json.loads(said or '{"harness": "the process died, or took too long"}')

class Runner:
    "The process that the runs are forked from: `Runner()(chapter=..., old=..., new=...)`."
    def __init__(self):
        env = {**os.environ, "MPLBACKEND": "agg", "PYTHONDONTWRITEBYTECODE": "1", "IN_TEST": "1"}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    def __call__(self, **task):
        start = time.perf_counter()
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return dict(json.loads(self.process.stdout.readline()), seconds=time.perf_counter() - start)
    def close(self): self.process.communicate()

if __name__ == "__main__":
    import matplotlib.pyplot, numpy, regex, safetensors.torch, tokenizers, tqdm.auto  # what every chapter imports anyway
    import torch, torch._dynamo, torch.testing, execnb.shell
    for line in sys.stdin: print(json.dumps(forked(json.loads(line), run, LIMIT)), flush=True)
