# Run `make` to list the targets.
.DEFAULT_GOAL := help
.PHONY: help run test test-unit test-kubernetes test-cgroup2 lint bench cluster-up cluster-down airgap preflight lock clean

BIN := .venv/bin

# pass these on unchanged: otherwise make expands $ in them
define as_written
ifdef $(1)
override $(1) := $$(value $(1))
export $(1)
endif
endef
$(foreach name,COMMAND ENVIRONMENT HOST_CONFIG,$(eval $(call as_written,$(name))))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: requirements-dev.txt scripts/setup.sh
	@scripts/setup.sh

run: .venv/ready ## run the flow on your Docker engine; IMAGE=… COMMAND=… ENVIRONMENT=… HOST_CONFIG=… TIME_LIMIT=…
	@$(BIN)/python -m scripts.run

test: lint ## lint, and run all tests that this machine can run
	@if $(BIN)/python -m scripts.cluster possible; then $(BIN)/pytest; \
	else echo 'The cluster tests are left out. Install kind, or without Docker Hub run `make airgap`.'; \
	$(BIN)/pytest tests/unit tests/docker; fi

test-unit: .venv/ready ## run the tests that need no Docker engine
	@$(BIN)/pytest tests/unit

test-kubernetes: .venv/ready ## run the tests on a kind cluster; without one they fail
	@$(BIN)/pytest tests/kubernetes

test-cgroup2: .venv/ready ## run the daemons of the templates on a node with cgroup v2, in QEMU (10 min; Debian, root)
	@$(BIN)/pytest tests/cgroup2

lint: .venv/ready ## run ruff, mypy, yamllint, shellcheck, hadolint, zizmor and codespell
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy flows scripts
	@$(BIN)/yamllint --strict .
	@$(BIN)/shellcheck .ci/run scripts/airgap/node/init tests/cgroup2/node scripts/airgap/runc-drop-missing-caps $$(git ls-files '*.sh')
	@$(BIN)/hadolint Dockerfile scripts/airgap/*.Dockerfile
	@$(BIN)/zizmor --offline --quiet --no-progress .github/workflows
	@$(BIN)/codespell --ignore-words-list caf $$(git ls-files ':!requirements*' ':!*go.sum' ':!*go.mod')

bench: .venv/ready ## measure what the sidecar costs, into docs/benchmarks.md (5 min; with a cluster, 25 more)
	@$(BIN)/python -m scripts.bench
	@if $(BIN)/python -m scripts.cluster possible; then $(BIN)/pytest tests/kubernetes/bench_cluster.py; \
	else echo 'The cluster is left out. Install kind, or without Docker Hub run `make airgap`.'; fi

cluster-up: .venv/ready ## start a kind cluster, with its own kubeconfig and a local registry (about a minute)
	@$(BIN)/python -m scripts.cluster up

cluster-down: .venv/ready ## delete the cluster
	@$(BIN)/python -m scripts.cluster down

airgap: .venv/ready ## without Docker Hub: build all images, Docker and Kubernetes from source (about 15 min, once)
	@$(BIN)/python -m scripts.cluster airgap

preflight: .venv/ready ## check the setup for Kubernetes; changes nothing; NAMESPACE=… SERVICE_ACCOUNT=… PROJECT=…
	@$(BIN)/python -m scripts.preflight

lock: .venv/ready ## update requirements.txt and requirements-dev.txt
	@scripts/lock.sh

clean: .venv/ready ## stop everything; remove .venv and caches
	@$(BIN)/python -m scripts.cluster clean
	@rm -rf .venv
