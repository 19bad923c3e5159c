# Each target does its own set-up; a second run needs no network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup system check lint types layers coverage test test-slow soak demo demo-linux bench qemu linux plugin images test-containers lock clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

setup: system $(INSTALLED)  ## the virtual environment in .venv, from locked versions

# nasm assembles the guests, gcc compiles the QEMU plugin; QEMU and gdbserver are stubs to connect to, gdb is a peer of the benchmarks; chromium opens the report in the tests. Debian keeps what `python3 -m venv` needs in a package of its own.
system:
	@missing=; \
	command -v nasm >/dev/null || missing="$$missing nasm"; \
	command -v cc >/dev/null || missing="$$missing gcc libc6-dev"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	command -v qemu-system-x86_64 >/dev/null || missing="$$missing qemu-system-x86 seabios"; \
	command -v gdbserver >/dev/null || missing="$$missing gdbserver"; \
	command -v gdb >/dev/null || missing="$$missing gdb"; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ]; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y $$missing; \
	else \
		echo "missing system packages:$$missing (as root: apt-get install$$missing)" >&2; exit 1; \
	fi

$(INSTALLED): requirements.lock pyproject.toml | system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

check: lint types layers coverage  ## format, lint, types, layers, and the tests with coverage

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports --no-logo

coverage: setup
	$(BIN)/coverage erase
	$(PYTEST) -q --cov --cov-report=term

test: setup  ## all tests but the slow ones, on up to four cores; minutes
	$(PYTEST) -q -n auto --maxprocesses 4 --dist worksteal

test-slow: setup  ## the tests that take long
	$(PYTEST) -q -m slow

soak: setup  ## 1,000,000 traps with faults over 64 lanes, on asyncio and on trio; minutes
	$(BIN)/python tests/soak/fault_soak.py --loop asyncio
	$(BIN)/python tests/soak/fault_soak.py --loop trio

demo: setup  ## a real guest calls the ready-made handlers and checks every answer
	@$(BIN)/python guest/demo/demo.py

demo-linux: setup qemu linux  ## a real Linux in QEMU calls from programs and from its kernel
	@$(BIN)/python guest/linux/demo.py

bench: setup qemu linux  ## what a trap costs, and how many may wait; minutes, pinned to one core
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/lanes.py
	$(BIN)/python benchmarks/waiting.py
	$(BIN)/python benchmarks/recording.py
	$(BIN)/python benchmarks/qemu_plugin.py
	$(BIN)/python benchmarks/qemu_gdb.py
	$(BIN)/python benchmarks/linux_boot.py
	$(BIN)/python benchmarks/remote.py

qemu:  ## QEMU 11.1 in .qemu, for the plugin: linked to, or unpacked from Debian's packages
	@guest/qemu/fetch-qemu

linux: system  ## a Linux guest in .linux: Debian's kernel and busybox, with programs and a module of ours
	@guest/linux/fetch-linux
	@guest/linux/build-guest

plugin: setup  ## the QEMU plugin, .qemu/vmibridge-plugin.so
	@$(BIN)/vmibridge qemu build-plugin -o .qemu/vmibridge-plugin.so

images: setup  ## the images of docker/, with podman or docker
	@$(BIN)/python docker/build_images.py

test-containers: setup linux  ## builds the images and runs them side by side, with podman; minutes
	$(PYTEST) -q -m containers tests/containers

lock: setup  ## lock the newest versions that pyproject.toml allows
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
		--generate-hashes --no-annotate --no-header pyproject.toml -o requirements.lock

clean:  ## remove what the other targets made
	rm -rf $(VENV) .qemu .linux .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
