# Run `make` to list the targets.
.DEFAULT_GOAL := help
.PHONY: help run test test-unit test-kubernetes test-cgroup2 lint bench cluster-up cluster-down airgap preflight lock clean

BIN := .venv/bin

# What the programs read from the environment, also if it stands on make's command line.
SETTINGS := BIN DOCKER_HOST DOCKER_CONTEXT DOCKER_CONFIG DOCKER_CERT_PATH DOCKER_TLS_VERIFY \
  FLOW_% GO% HOME JOB_TEMPLATE KIND_% KUBE% MAKE% PATH PIP_% PREFECT__% PYTHON% SHELL SSL_% \
  REQUESTS_CA_BUNDLE UV_% XDG_% %_PROXY %_proxy
# Anything else there is a parameter. It is handed on as it was written, in GIVEN: scripts/given.py
# reads it. It is not exported, because make would expand the $ in it. `override` is for `make -e`.
parameters = $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
unexport $(filter-out $(SETTINGS),$(parameters))
override GIVEN := $(MAKEOVERRIDES)
export GIVEN

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: requirements.txt requirements-build.txt scripts/setup.sh
	@scripts/setup.sh

.venv/dev: .venv/ready requirements-dev.txt
	@scripts/setup.sh dev

run: .venv/ready ## run the flow on your Docker engine; IMAGE=… COMMAND=… and the flow's other parameters
	@$(BIN)/python -m scripts.run

test: lint ## lint, and run all tests that this machine can run
	@$(BIN)/python -m scripts.cluster test

test-unit: .venv/dev ## run the tests that need no Docker engine
	@$(BIN)/python -m scripts.cluster test tests/unit

test-kubernetes: .venv/dev ## run the tests on a kind cluster; without one they fail
	@$(BIN)/python -m scripts.cluster test tests/kubernetes

test-cgroup2: .venv/dev ## run the daemons of the templates on a node with cgroup v2, in QEMU (10 min; Debian, root)
	@$(BIN)/pytest tests/cgroup2

# what tests and patterns misspell on purpose
MISSPELT := caf,cancell,comand,ecret,intervall,nam,platfrom

lint: .venv/dev ## run ruff, mypy, complexipy, yamllint, shellcheck, hadolint, zizmor and codespell
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy flows scripts tests
	@$(BIN)/complexipy flows scripts --max-complexity-allowed 15 --plain --failed
	@$(BIN)/yamllint --strict .
	@$(BIN)/shellcheck .ci/run scripts/airgap/node/init tests/cgroup2/node scripts/airgap/runc-drop-missing-caps $$(git ls-files '*.sh')
	@$(BIN)/hadolint Dockerfile scripts/airgap/*.Dockerfile
	@$(BIN)/zizmor --offline --quiet --no-progress .github/workflows
	@$(BIN)/codespell --ignore-words-list $(MISSPELT) $$(git ls-files ':!requirements*' ':!*go.sum' ':!*go.mod')

bench: .venv/dev ## measure what the sidecar costs, into docs/benchmarks.md (half an hour)
	@$(BIN)/python -m scripts.cluster bench

cluster-up: .venv/ready ## start a kind cluster, with its own kubeconfig and a local registry (about a minute)
	@$(BIN)/python -m scripts.cluster up

cluster-down: .venv/ready ## delete the cluster
	@$(BIN)/python -m scripts.cluster down

airgap: .venv/ready ## without Docker Hub: build all images, Docker and Kubernetes from source (about 15 min, once)
	@$(BIN)/python -m scripts.cluster airgap

preflight: .venv/ready ## check the setup for Kubernetes; changes nothing; NAMESPACE=… SERVICE_ACCOUNT=… PROJECT=…
	@$(BIN)/python -m scripts.preflight

lock: .venv/ready ## update the requirements files
	@scripts/lock.sh

clean: .venv/ready ## stop everything; remove .venv and caches
	@$(BIN)/python -m scripts.cluster clean; status=$$?; rm -rf .venv .*_cache; exit $$status
