# One word each. `make install` first runs by itself where something needs it.
PY := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: help install check test test-containers up down demo clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 18

install: $(INSTALLED) ## .venv, Kafka's jars, redis-server

$(INSTALLED): pyproject.toml constraints.txt infra/install.sh infra/kafka/pom.xml
	infra/install.sh
	@touch $@

check: $(INSTALLED) ## ruff, mypy, import order
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_layers.py

test: $(INSTALLED) ## unit and integration tests, on a real broker and Redis (ARGS="-k name")
	$(PY) -m pytest $(ARGS)

test-containers: $(INSTALLED) ## the integration tests, broker and Redis in containers
	infra/containers/with-engine.sh $(PY) -m pytest -m integration --brokers=containers $(ARGS)

up: $(INSTALLED) ## a Kafka broker and a Redis on this machine
	.venv/bin/tailrace up

down: ## stop what `make up` started
	.venv/bin/tailrace down

demo: $(INSTALLED) ## clicks in, ranked lists out, a new model (LOG=a Taobao-format log)
	$(PY) -m infra.demo $(if $(LOG),--log $(LOG))

clean: ## stop the servers; remove their data, the jars and all caches, but not .venv
	[ ! -x .venv/bin/tailrace ] || .venv/bin/tailrace down
	rm -rf .tailrace .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	rm -f $(INSTALLED)
