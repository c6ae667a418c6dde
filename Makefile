# Every habit is a target. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help run test test-unit test-kubernetes lint bench docs sidecar-up sidecar-down cluster-up cluster-down airgap preflight lock clean

BIN := .venv/bin

ifdef COMMAND # make would take a $ in it for a variable of its own
override COMMAND := $(value COMMAND)
export COMMAND
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: requirements-dev.txt scripts/setup.sh
	@scripts/setup.sh

run: .venv/ready ## run the flow on a Docker daemon of its own; IMAGE=… COMMAND=… run anything
	@$(BIN)/python -m scripts.run

test: lint ## lint, and all tests that this machine can run
	@if $(BIN)/python -m scripts.cluster possible; then $(BIN)/pytest; \
	else echo 'The cluster tests are left out: `make airgap` enables them.'; $(BIN)/pytest tests/unit tests/docker; fi

test-unit: .venv/ready ## the tests that need no Docker daemon
	@$(BIN)/pytest tests/unit

test-kubernetes: .venv/ready ## the tests on a kind cluster; without one they fail
	@$(BIN)/pytest tests/kubernetes

lint: .venv/ready ## ruff, mypy, yamllint, shellcheck, hadolint, zizmor, codespell
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy flows
	@$(BIN)/yamllint --strict .
	@$(BIN)/shellcheck .ci/run $$(git ls-files '*.sh')
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/zizmor --offline --quiet --no-progress .github/workflows
	@$(BIN)/codespell --ignore-words-list caf $$(git ls-files ':!requirements*')

bench: .venv/ready ## measure what it costs, into docs/benchmarks.md (8 min; with a kind cluster, 12 more)
	@$(BIN)/python -m scripts.bench
	@if $(BIN)/python -m scripts.cluster possible; then $(BIN)/pytest tests/kubernetes/bench_cluster.py; \
	else echo 'The measurements on a cluster are left out: `make airgap` enables them.'; fi

docs: .venv/ready ## draw the pictures in docs/ (needs Graphviz)
	@$(BIN)/python -m scripts.pictures

sidecar-up: .venv/ready ## start the Docker daemon that `make run` uses, and keep it
	@$(BIN)/python -m scripts.sidecar up

sidecar-down: .venv/ready ## stop it
	@$(BIN)/python -m scripts.sidecar down

cluster-up: .venv/ready ## start a kind cluster, with its own kubeconfig and a local registry
	@$(BIN)/python -m scripts.cluster up

cluster-down: .venv/ready ## delete it
	@$(BIN)/python -m scripts.cluster down

airgap: .venv/ready ## where Docker Hub is out of reach: build all images, Kubernetes too (about 6 min, once)
	@$(BIN)/python -m scripts.cluster airgap

preflight: .venv/ready ## is all there to register and run on Kubernetes? NAMESPACE=… PROJECT=… changes nothing
	@$(BIN)/python -m scripts.preflight

lock: .venv/ready ## renew requirements.txt and requirements-dev.txt
	@scripts/lock.sh

clean: .venv/ready cluster-down ## end all that runs, and remove .venv and all that is kept for the next time
	@$(BIN)/python -m scripts.sidecar clean
	@rm -rf .venv
