# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Without a GPU the kernels run in Triton's interpreter, which is chosen before Python starts.
CPU_ENV = $(shell $(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else 'TRITON_INTERPRET=1 FUSEPASS_CPU=interpret')")

.PHONY: demo test test-slow test-gpu test-matrix all-models hf-tests fuzz mutate lint typecheck bench readme checkpoint clean

demo: $(VENV)/.installed  ## set up, load the checkpoint, fuse, generate, compare
	$(CPU_ENV) $(BIN)/python examples/demo.py $(ARGS)

# One process a core, and one thread a process: the interpreter is Python.
test: $(VENV)/.installed  ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not gpu and not slow" $(ARGS)

test-slow: $(VENV)/.installed  ## those that take minutes in Triton's interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not gpu and slow" $(ARGS)

test-gpu: $(VENV)/.installed  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-matrix:  ## site counts, logits and the decode loop on the oldest and the newest transformers, each in its own environment
	for version in 4.57.6 5.23.0; do \
	  $(PYTHON) -m venv $(VENV)-$$version && \
	  $(VENV)-$$version/bin/pip install -q -c constraints-matrix.txt -e .[test] transformers==$$version && \
	  $(VENV)-$$version/bin/python -m pytest tests/test_qwen3_sites.py tests/decode_loop || exit 1; \
	done

all-models: $(VENV)/.installed  ## every causal LM of transformers beside eager; resumes; writes docs/causal-lms.md
	$(BIN)/python -W ignore -m tests.causal_lms $(ARGS)

hf-tests: $(VENV)/.installed  ## the tests of a source checkout of transformers: make hf-tests TRANSFORMERS_SRC=...
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[hf-tests]"
	$(BIN)/python -m tests.hf $(TRANSFORMERS_SRC) --record docs/hf-tests.md $(ARGS)

fuzz: $(VENV)/.installed  ## draw 10,000 decoder blocks and compare each with eager (hours)
	FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest -s tests/fuzz $(ARGS)

mutate: $(VENV)/.installed  ## take out each validity check: does a test notice? (an hour; it goes on where it was stopped)
	$(BIN)/python -m tests.mutate_checks $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

typecheck: $(VENV)/.installed
	$(BIN)/mypy

bench: $(VENV)/.installed  ## speed of whole models beside eager and Inductor (needs a GPU)
	$(BIN)/python -m fusepass bench $(ARGS)

readme: $(VENV)/.installed  ## the README's results from the records in benchmarks/results
	$(BIN)/python benchmarks/readme_table.py

checkpoint: $(VENV)/.installed  ## train the demo's checkpoint again
	$(BIN)/python examples/train_tiny_qwen3.py

# torchao beside the environment: transformers imports it where it is installed, and it prints what it misses.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,test,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(VENV)/torchao torchao
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info
