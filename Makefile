PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

SHELL := bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test test-long setup lint compile check audit bench wheel images wheels lock clean

help:  ## list these targets
	@sed -nE 's/^([a-z%-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

run: setup  ## the whole pipeline here, on the default recipe
	$(BIN)/nudge run eiffel

# One worker more than cores, because tests often wait for the servers that they start.
WORKERS := $(shell cores=$$(nproc); echo $$((cores < 4 ? cores + 1 : 4)))
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test: setup  ## the tests
	$(PYTEST)

test-long: setup  ## the tests that take minutes, with the optional packages that they need
	$(call install,mlflow ray tasks)
	$(PYTEST) -m long

# What uv.lock pins for these extras, checked against its hashes. PyTorch comes separately, because
# the lock's is the CUDA build: TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the CPU build.
TORCH_INDEX ?=
UV := $(BIN)/uv
install = $(UV) export --quiet --frozen $(addprefix --extra ,$(1)) --prune torch --no-emit-project \
	--no-emit-package nudge-kernels | $(UV) pip install --quiet --no-deps --requirement -

setup: $(STAMP)  ## the virtual environment .venv

$(STAMP): pyproject.toml kernels/pyproject.toml uv.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "uv==$$(sed -n '/^name = "uv"$$/{n;s/version = "\(.*\)"/\1/p}' uv.lock)"
	$(call install,data train release pipeline local dev example)
	$(UV) export --quiet --frozen --extra train --no-hashes --no-emit-project \
		--no-emit-package nudge-kernels --output-file $(VENV)/constraints.txt
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		--constraint $(VENV)/constraints.txt torch
	$(UV) pip install --quiet --no-deps --editable ./kernels --editable .
	touch $(STAMP)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compile: setup  ## write pipelines/compiled and the other generated files
	$(BIN)/nudge compile

check: setup lint  ## what CI runs
	$(UV) lock --check --offline --quiet
	$(BIN)/nudge compile --check
	$(PYTEST)

audit: setup  ## the locked packages against the known advisories; says so where none can be had
	$(BIN)/python .ci/audit.py

BENCHES := $(patsubst tests/bench/bench_%.py,bench-%,$(wildcard tests/bench/bench_*.py))
bench: $(BENCHES)  ## every benchmark

bench-%: setup  ## one benchmark: ours beside the named peer, in one run
	$(call install,bench)
	$(BIN)/python -m tests.bench.bench_$*

# Not after `setup`, which needs the network: any Python with torch, setuptools and pip will do.
WHEEL_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
wheel:  ## the fused loss with its CUDA kernel, in dist/; needs nvcc and torch, no GPU, no network
	NUDGE_KERNELS_CUDA=1 $(WHEEL_PYTHON) -m pip wheel --quiet --no-index --no-deps --no-build-isolation --check-build-dependencies --wheel-dir dist ./kernels

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

lock: setup  ## uv.lock, and the images' hashed requirement files from it
	$(UV) lock
	$(BIN)/python images/requirements.py

clean:  ## remove the virtual environment, builds and .nudge, after its services are stopped
	-if [ -x $(BIN)/nudge ]; then $(BIN)/nudge services down; fi
	rm -rf $(VENV) .nudge build dist *.egg-info kernels/build kernels/*.egg-info
