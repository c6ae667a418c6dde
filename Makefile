# Every habit is a target. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help run test lint sidecar-up sidecar-down lock clean

BIN := .venv/bin

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "  make %-16s %s\n", $$1, $$2}'

.venv/ready: requirements-dev.txt scripts/setup.sh
	@scripts/setup.sh

run: .venv/ready ## run the flow on a Docker daemon of its own; IMAGE=… COMMAND=… run anything
	@$(BIN)/python -m scripts.run

test: lint ## lint, and all tests that this machine can run
	@$(BIN)/pytest tests/unit
	@$(BIN)/pytest tests/docker

lint: .venv/ready ## ruff, mypy, yamllint, shellcheck, hadolint
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy flows scripts
	@$(BIN)/yamllint --strict .
	@$(BIN)/shellcheck .ci/run $$(git ls-files '*.sh')
	@$(BIN)/hadolint Dockerfile

sidecar-up: .venv/ready ## start the Docker daemon that `make run` uses, and keep it
	@$(BIN)/python -m scripts.sidecar up

sidecar-down: .venv/ready ## stop it
	@$(BIN)/python -m scripts.sidecar down

lock: .venv/ready ## renew requirements.txt and requirements-dev.txt
	@scripts/lock.sh

clean: .venv/ready ## remove .venv, and the daemon's images and layers
	@$(BIN)/python -m scripts.sidecar clean
	@rm -rf .venv
