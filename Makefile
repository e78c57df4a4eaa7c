# Eight targets. Each does its own set-up: a fresh machine needs Python 3.11, pip, venv and make, nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
ORACLES ?= ../shared/oracles

.PHONY: setup check test test-all parity demo docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

check: setup
	$(BIN)/ruff format --check scantling tests examples
	$(BIN)/ruff check scantling tests examples
	$(BIN)/mypy

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: setup
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

parity: setup
	$(BIN)/python -m tests.parity $(ORACLES)

demo: setup
	$(BIN)/scantling study examples/demo/study.yaml --out $(DEMO)/study
	$(BIN)/scantling fit $(DEMO)/study --compare family --tied --out $(DEMO)/compare.json
	$(BIN)/scantling fit $(DEMO)/study --only family=uniform --tied --out $(DEMO)/law.json > $(DEMO)/law.txt
	$(BIN)/scantling plan examples/demo/plan.yaml --set law=$(abspath $(DEMO))/law.json --out $(DEMO)/plan.json
	$(BIN)/scantling report $(DEMO)/study $(DEMO)/compare.json $(DEMO)/plan.json --out $(DEMO)/report.html
	@echo "Open $(DEMO)/report.html in a browser."

docs: setup
	$(BIN)/python docs/accounting.py
	$(BIN)/pdoc --docformat google --output-directory site scantling $(addprefix scantling.,parts spec resolve rows costing shapes config \
	  data data.corpus data.dataset recipe lineage record study laws laws.forms laws.fitting laws.savings planning reporting model training checkpoint \
	  tensor_files hf_folder hf_weights hf_writer growth $(addprefix growth.,path steps axes receipt weights attention copies depth \
	  experts feedforward folders hidden layerwise noise stream tables))

clean:
	rm -rf $(DEMO) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
