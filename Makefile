PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: finetune test book docs export record bench refresh mutants mutate
.DEFAULT_GOAL := finetune

finetune: $(READY)  ## fine-tune the bundled base on the bundled stories
	$(BIN)/python -m tiny_llm.finetune

test: $(READY)  ## run every notebook and every pytest
	$(BIN)/python -m pytest

book: $(READY)  ## open the book at chapter 1
	$(BIN)/jupyter lab nbs/01_lora.ipynb

docs: $(READY)  ## build the site: Quarto where it is installed, the stand-in elsewhere
	$(BIN)/python .ci/site.py

record: $(READY)  ## conformance, faults and fuzz: write what the tests measure to the record that the book prints
	$(BIN)/python -m pytest tests/conformance tests/test_faults.py tests/test_fuzz.py --record

bench: $(READY)  ## time fine-tuning against PEFT and the floor (20 minutes, nothing else running), for the chapter on speed
	$(BIN)/python benchmarks/bench.py

mutants: $(READY)  ## break each idea of the book in one place; its chapter must notice
	$(BIN)/python -m pytest -q tests/mutants

mutate: $(READY)  ## change four modules in many small ways; list what no test notices (an hour; goes on where it stopped)
	$(BIN)/python tests/mutants/mutate.py

export: $(READY)  ## notebooks -> package, reference pages, README and tidy notebooks
	$(BIN)/nbdev_export
	$(BIN)/python .ci/reference.py
	$(BIN)/nbdev_clean
	$(BIN)/python .ci/readme.py

refresh: $(READY)  ## execute every notebook in Jupyter and save what comes out
	$(BIN)/python .ci/fresh.py --save

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
