PYTHON = python3
VENV = .venv/$(subst /,_,$(PYTHON))

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: ## the relay and a stand-in for Webex, with the sample alarms, in a few seconds
	@$(PYTHON) tests/tools/demo.py

test: $(VENV)/bin/pytest ## the tests; PYTHON=python3.9 for another Python
	$(VENV)/bin/python tests/tools/parts.py

test-hosts: ## the whole story on Debian 11, 12 and 13 (as root, on a Debian with systemd-nspawn)
	$(PYTHON) tests/tools/hosts.py

$(VENV)/bin/pytest:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check pytest

bench: ## how fast and how small: ratios measured in turns, in under three minutes
	@$(PYTHON) tests/tools/bench.py

clean: ## remove .venv and what Python leaves behind
	rm -rf .venv __pycache__ tests/__pycache__ tests/*/__pycache__ tests/screenshots

.PHONY: help demo test test-hosts bench clean
