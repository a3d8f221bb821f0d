# Two commands set everything up by themselves in .venv: `make picture` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: picture test lint types imports test-oldest clean

picture: .venv/base
	$(BIN)/linfusion generate "red apple" --mechanism clear --radius 8 --compare --out out.png

test: .venv/dev
	$(BIN)/pytest -n auto --dist worksteal

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the package as it is installed: the folders at the top level inside linfusion
types: .venv/dev
	rm -rf build/types && mkdir -p build/types && cp -r linfusion build/types/
	cp -r kernels pipelines distill demos build/types/linfusion/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml linfusion

# from the repository root, where a careless kernels/ folder would break both
imports: .venv/dev
	$(BIN)/python -c "import transformers, diffusers; import diffusers.models.attention_dispatch; print('imports ok')"

# the same interpreter and torch, with the oldest supported hosts in front
test-oldest: .venv/oldest
	PYTHONPATH=.venv/oldest-hosts $(BIN)/python -c "import diffusers, transformers; print('diffusers', diffusers.__version__, 'transformers', transformers.__version__)"
	PYTHONPATH=.venv/oldest-hosts $(BIN)/pytest -m parity -n auto --dist worksteal

# a stamp rather than bin/python, which a failed venv (Debian without python3-venv) leaves behind
.venv/made:
	$(PYTHON) -m venv --clear .venv
	touch $@

.venv/base: pyproject.toml constraints.txt | .venv/made
	$(PIP) -e .
	touch $@

.venv/dev: pyproject.toml constraints.txt | .venv/made
	$(PIP) -e ".[dev]"
	touch $@ .venv/base

.venv/oldest: oldest.txt .venv/dev
	rm -rf .venv/oldest-hosts
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/oldest-hosts -r oldest.txt
	touch $@

clean:
	rm -rf .venv build out.png
