# `make demo` and `make test` need Python 3.11 and nothing else: the first call makes .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo compare test test-slow test-gpu lint format clean fuzz

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet -e ".[dev,gguf,cluster,tracking,harness,peft]"
	touch $@

demo: $(READY)
	$(BIN)/python toxicity/demo.py

compare: $(READY)
	$(BIN)/python toxicity/compare.py

# two processes, a file of tests at a time; models that small gain nothing from threads
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# what is different on a GPU; needs one, and says so where there is none
test-gpu: $(READY)
	TEST_GPU=1 $(BIN)/python -m pytest -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py
