PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
DOCS := .venv/.docs
ZOO := .venv/.zoo

# Bytecode is compiled when a module is first imported: few of those that are installed ever are.
INSTALL := $(BIN)/pip install --quiet --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test docs dist bench-core bench-quick bench bench-tune higgs-sim bench-learning bench-scale zoo fuzz calibration

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist worksteal

# The documentation's site, into build/site.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=src $(BIN)/mkdocs build --strict  # with --quiet, warnings would not count

$(DOCS): $(READY)
	$(INSTALL) -e '.[docs]'
	touch $@

# Wheel and sdist; then the README's snippet and the command line in a fresh environment with the wheel alone.
dist: $(READY)
	rm -rf dist build/fresh && $(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/pip install --quiet -c constraints.txt dist/*.whl
	build/fresh/bin/python -c 'import re; exec(re.search("\x60{3}python\n(.*?)\x60{3}", open("README.md").read(), re.S)[1])'
	build/fresh/bin/apoptorch doctor

bench-core: $(READY)
	$(BIN)/python -m benchmarks.core
	$(BIN)/python -m benchmarks.tables

bench-learning: $(READY)
	$(BIN)/python -m benchmarks.learning

fuzz: $(READY)
	$(BIN)/python -m benchmarks.fuzz --cases 1000000

calibration: $(READY)
	$(BIN)/python -m benchmarks.calibration --seeds 0 1
	$(BIN)/python -m benchmarks.calibration_page

# Several hosts as network namespaces (root), hours; goes on where it stopped. Then docs/scaling.md.
bench-scale: $(READY)
	$(BIN)/python -m benchmarks.scale.hosts
	$(BIN)/python -m benchmarks.scale.model

zoo: $(ZOO)
	$(BIN)/python -m benchmarks.zoo

$(ZOO): $(READY)
	$(INSTALL) -e '.[zoo]'
	$(INSTALL) --no-deps torchvision timm
	touch $@

# Ten minutes: every contender on four small tasks, into runs/bench-quick.
bench-quick: $(READY)
	$(BIN)/python -m benchmarks.full --quick
	$(BIN)/python -m benchmarks.peers --quick

# At most eight hours a call, and goes on where it stopped: call it until it has nothing more to do.
bench: $(READY)
	$(BIN)/python -m benchmarks.full
	$(BIN)/python -m benchmarks.tables

# Chooses learning rate and weight decay of the dense networks on validation data, into benchmarks/recipes.json.
bench-tune: $(READY)
	$(BIN)/python -m benchmarks.tune

# Simulates as many events as the full higgs-sim set has, into runs/higgs-sim; goes on where it stopped. About an hour.
higgs-sim: $(READY)
	$(INSTALL) -e '.[higgs]'
	$(BIN)/python -m benchmarks.higgs_sim runs/higgs-sim

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[report,bench,lightning,transformers,onnx,dev]'
	touch $@
