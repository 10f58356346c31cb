# Everything a developer runs. `make test` sets up all it needs on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
NPU := $(abspath $(VENV))/torch_npu
JOBS ?= 2
SECONDS ?= 600

.PHONY: install tools javascript test test-slow test-oldest test-ascend fuzz audit hashes check lint types layers docs format bench

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,docs,page]"
	touch $@

test: install tools javascript  ## all tests but the slow ones
	$(BIN)/python -m pytest -n $(JOBS)

tools:  ## a browser, a Chinese font, a compiler: from Debian where that is possible; else their tests are skipped or fail
	@command -v chromium >/dev/null && command -v g++ >/dev/null && command -v ninja >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq \
	  --no-install-recommends chromium fonts-noto-cjk g++ ninja-build python3-dev >/dev/null; } \
	  || echo "Chromium, g++ or ninja is missing: without Chromium its tests are skipped, without a compiler those of the simulated NPU fail"

javascript: install  ## the images API's JavaScript client, where npm is; else its test is skipped
	@if command -v npm >/dev/null; then [ -d $(VENV)/node_modules/openai ] \
	  || npm install --silent --no-audit --no-fund --prefix $(VENV) openai@6.49.0; \
	else echo "npm is missing: the test of the JavaScript client is skipped"; fi

test-slow: install  ## long ones: kills, fuzzing, timings; one after the other
	$(BIN)/python -m pytest -m slow

fuzz: install  ## all fuzz targets, SECONDS in all; a finding is an error (fuzz/README.md)
	$(BIN)/python -W ignore -m fuzz --seconds $(SECONDS)

test-oldest: install $(OLDEST)/.installed  ## the suite on the older versions Ascend users have (7 GB of disk)
	$(OLDEST)/bin/python -m pytest -n $(JOBS)
	$(BIN)/python benchmarks/versions.py $(BIN)/python $(OLDEST)/bin/python
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet -c constraints-oldest.txt -e ".[dev]"
	touch $@

test-ascend: install $(NPU)/.installed  ## the real torch_npu 2.13.0 over a stand-in CANN, on a CPU
	PYTHONPATH=$(NPU) TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(BIN)/python -m pytest -m ascend -n $(JOBS) tests/ascend
$(NPU)/.installed:  # in a folder of its own: beside a torch_npu that cannot load, import torch dies
	$(BIN)/pip install --quiet --no-deps --target $(NPU) torch_npu==2.13.0 pyyaml
	touch $@

check: lint types layers docs  ## all that is no test

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src

audit: install  ## known vulnerabilities of the tested versions; it asks PyPI, and fails where that cannot answer
	$(BIN)/pip install --quiet -c constraints.txt -e ".[audit]"
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints-oldest.txt

hashes: install  ## requirements.lock: the tested versions of the runtime dependencies, with the SHA-256 of their files
	$(BIN)/pip install --quiet -c constraints.txt -e ".[audit]"
	$(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --python-version 3.11 \
	  --custom-compile-command "make hashes" --constraint constraints.txt --extra serve \
	  --output-file requirements.lock pyproject.toml

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

docs: install  ## the reference pages are up to date, and Sphinx has nothing to complain about
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## ratios against diffusers on this machine
	$(BIN)/python benchmarks/overhead.py
