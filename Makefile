# Every verb installs what it needs into .venv by itself. PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: demo test check lint bench clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt 'setuptools>=68' wheel
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# The whole loop with the shipped miniature model: about two minutes on two cores, after the installation.
demo: $(INSTALLED)
	.venv/bin/seal-engine demo

# The same kernel tests run three ways: torch on the CPU, the Triton code in its interpreter, Triton on a GPU.
test: $(INSTALLED)
	$(PY) -m pytest -n 2
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 tests/kernels

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

check: lint test

bench: $(INSTALLED)
	$(PY) -m pytest -p no:warnings benchmarks --benchmark-only -q -s

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
