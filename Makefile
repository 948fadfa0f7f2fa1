PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check format codegen bench clean

## The main job: set up, then write code with the built-in 4-bit model.
demo: $(VENV)/.run
	@printf "def fibonacci(n):"
	@$(BIN)/gfxlm generate -p "def fibonacci(n):" --max-tokens 120

## Set up, check, test.
test: check
	$(BIN)/pytest -n 2

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

## Compile every kernel for every AMD target, and write down what came out. Continues where it was interrupted.
codegen: $(VENV)/.test
	$(BIN)/python tools/codegen.py

## Measure every kernel on the GPU that is here, if the kernels' tests pass.
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.run --json benchmarks.json

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.run
