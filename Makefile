# Every target sets up what it needs in .venv and is fast when that is done. `make` alone explains them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

# The interpreter behind .venv: the first that is new enough. `make PYTHON=/path/to/python3` names another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
# One more package index, for example that of PyTorch's CPU-only wheels, which are ten times smaller than the default.
TORCH_INDEX ?=
# docker, or podman.
ENGINE ?= docker
# Words for pytest: `make test PYTEST="-k suspend -x"`.
PYTEST ?=

VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# Fast ones first, so that a slip shows early.
SUITES := $(wildcard $(addprefix tests/,api benchmarks delivery operator trainer cluster e2e))
KIND_CLUSTER := pylon
KIND_KUBECONFIG := .cache/kind.kubeconfig

# Native certificates, because many networks have an authority of their own.
export UV_SYSTEM_CERTS = 1

.PHONY: help run test check crds images kind cluster clean
.DEFAULT_GOAL := help

help: ## Explain the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

run: $(VENV)/run.stamp .cache/entropy ## Train the quickstart on this machine and watch it
	@echo "Marks for the held-out loss: what a table of the text's n-grams would reach" && cat .cache/entropy
	@$(BIN)/pylon run examples/quickstart.yaml

test: $(VENV)/test.stamp ## Run every suite that this machine can run, on a real Kubernetes API server
	@$(BIN)/python tests/cluster/control_plane.py build >/dev/null
	@PYLON_REQUIRE_CLUSTER=1 $(BIN)/pytest --quiet $(PYTEST) $(SUITES)

check: $(VENV)/test.stamp ## Lint, types, import layers, generated files
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PATH=$(BIN):$$PATH $(BIN)/lint-imports
	@$(BIN)/pylon crds --check

crds: $(VENV)/run.stamp ## Write the CRD and docs/api.md from the models
	@$(BIN)/pylon crds

cluster: $(VENV)/test.stamp ## Run a Kubernetes control plane until Ctrl-C, to try things by hand
	@$(BIN)/python tests/cluster/control_plane.py up

images: ## Build both container images (needs docker or podman)
	$(call need,$(ENGINE))
	$(ENGINE) build --file images/operator.Dockerfile --tag pylon-operator:$(VERSION) .
	$(ENGINE) build --file images/trainer.Dockerfile --tag pylon-trainer:$(VERSION) .

kind: images $(VENV)/test.stamp ## Install the chart on a kind cluster and test it there (needs docker, kind, kubectl, helm)
	$(call need,kind)
	$(call need,kubectl)
	$(call need,helm)
	kind get clusters | grep --quiet --line-regexp $(KIND_CLUSTER) || kind create cluster --name $(KIND_CLUSTER) --wait 120s
	mkdir -p $(dir $(KIND_KUBECONFIG)) && kind get kubeconfig --name $(KIND_CLUSTER) > $(KIND_KUBECONFIG)
	kind load docker-image --name $(KIND_CLUSTER) pylon-operator:$(VERSION) pylon-trainer:$(VERSION)
	kubectl --kubeconfig $(KIND_KUBECONFIG) apply --server-side --force-conflicts --filename charts/pylon/crds
	helm --kubeconfig $(KIND_KUBECONFIG) upgrade --install pylon charts/pylon \
		--namespace pylon-system --create-namespace --wait
	$(BIN)/pytest --quiet $(PYTEST) tests/cluster --kubeconfig $(KIND_KUBECONFIG)

clean: ## Remove the environment and caches, never runs or checkpoints
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- The environment ---

$(VENV)/run.stamp: EXTRAS := operator,trainer
$(VENV)/test.stamp: EXTRAS := operator,trainer,dev

# uv resolves and installs far faster than pip; where it cannot be had or fails, pip takes over.
$(VENV)/%.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing pylon-training[$(EXTRAS)] into $(VENV)" >&2
	@{ $(BIN)/python -m pip install --quiet --disable-pip-version-check uv && \
		$(BIN)/uv pip install --quiet --python $(BIN)/python $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) \
			--index-strategy unsafe-best-match) --editable ".[$(EXTRAS)]"; } || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--editable ".[$(EXTRAS)]" || \
	{ echo "The packages could not be installed: is there a network, or a mirror in PIP_INDEX_URL?" >&2; exit 1; }
	@touch $@

$(BIN)/python:
	@"$(or $(PYTHON),none)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "Pylon needs Python 3.11 or newer$(if $(PYTHON), ($(PYTHON) is none)). Install one, or name it:" \
		"make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

.cache/entropy: | $(VENV)/run.stamp
	@mkdir -p $(@D) && $(BIN)/pylon tokenizer entropy 'python://stdlib/**/*.py' > $@.part && mv $@.part $@

need = @command -v $(1) >/dev/null || { echo "'make $@' needs $(1), and it is not installed" >&2; exit 1; }
