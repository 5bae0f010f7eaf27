# Every command of the project. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat setup.cfg pyproject.toml | sha256sum | cut -c1-12)

.DEFAULT_GOAL := help
.PHONY: help venv lint test test-full demo demo-down enter dist schema examples golden clean

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name what; do \
		printf 'make %-10s %s\n' "$$name" "$$what"; done

venv: $(READY)  ## make .venv, with everything development needs

$(READY):
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		[ "$$(id -u)" = 0 ] || { echo 'python3-venv is missing: sudo apt-get install python3-venv' >&2; exit 1; }; \
		apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends python3-venv; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip --disable-pip-version-check install --quiet --editable '.[dev]'
	@rm -f $(VENV)/.ready-* && touch $@

lint: venv  ## ruff check, ruff format --check, mypy --strict
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint  ## lint, then all tests but the long ones; without root, says what it leaves out
	$(BIN)/pytest -m 'not full'

test-full: lint  ## everything: the same, the long ones, and what CI has no time for
	$(BIN)/pytest

demo: venv  ## four machines from user-data alone become a Swarm cluster (needs root)
	$(BIN)/python -m tests.lab.demo

demo-down: venv  ## take the demo's machines down, whatever state they are in
	$(BIN)/python -m tests.lab down

enter: venv  ## a root shell in a machine of the demo: make enter NODE=server1
	@$(BIN)/python -m tests.lab enter $(NODE)

dist: venv  ## dist/: the wheel, and the self-contained file with its sha256
	$(BIN)/python tools/build_release.py

schema: venv  ## write docs/node.schema.json
	$(BIN)/nodeagent schema > docs/node.schema.json.new && mv docs/node.schema.json.new docs/node.schema.json

examples: venv  ## write cloud-init/*.example.yaml again, from cloud-init/cluster.example.yaml
	$(BIN)/python -m tools.render_examples

golden: venv  ## write tests/golden/ again, from what the program says now; then read the diff
	NODEAGENT_GOLDEN=write $(BIN)/pytest -q tests/unit

clean:  ## remove what the other commands made, except the lab's cache
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
