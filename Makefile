# Each target does its own set-up; a second run needs no network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The run-time alone, which is enough for the demo; and all that developers need, in the same environment.
LIGHT := $(VENV)/.light
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
# Every lock is closed: what is installed is what it names, and no resolver chooses among releases.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
SAY := @printf 'make: %s\n'

.PHONY: help setup system system-light system-guests system-libraries system-containers check lint types public layers declared package test test-guests test-slow test-install test-libraries test-matrix soak demo demo-linux demo-linux-device bench qemu linux guest-tools plugin guest-headers images test-containers lock clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 19

setup: system $(INSTALLED)  ## the virtual environment in .venv, from locked versions

# What a demo needs. Debian keeps what `python3 -m venv` needs in a package of its own.
system-light:
	@missing=; \
	command -v nasm >/dev/null || missing="$$missing nasm"; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ]; then \
		echo "make: installs$$missing"; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y $$missing; \
	else \
		echo "make: missing packages:$$missing; as root: apt-get install$$missing" >&2; exit 1; \
	fi

# gcc compiles the QEMU plugin and programs for the Linux guest; QEMU and gdbserver are stubs to connect to, gdb is a peer of the benchmarks; chromium opens the report in the tests; debootstrap makes a Debian with nothing in it; zsh and fish complete commands; systemd checks the units.
system: system-light
	@missing=; \
	command -v cc >/dev/null || missing="$$missing gcc libc6-dev"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	command -v qemu-system-x86_64 >/dev/null || missing="$$missing qemu-system-x86 seabios"; \
	command -v gdbserver >/dev/null || missing="$$missing gdbserver"; \
	command -v gdb >/dev/null || missing="$$missing gdb"; \
	command -v zsh >/dev/null || missing="$$missing zsh"; \
	command -v fish >/dev/null || missing="$$missing fish"; \
	command -v debootstrap >/dev/null || [ -e /usr/sbin/debootstrap ] || missing="$$missing debootstrap"; \
	command -v systemd-analyze >/dev/null || missing="$$missing systemd"; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ]; then \
		echo "make: installs$$missing"; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y $$missing; \
	else \
		echo "make: tests that need these packages are skipped:$$missing; as root: apt-get install$$missing" >&2; \
	fi

# Debian has the programs of PostgreSQL's server in a folder for each version.
system-libraries:
	@missing=; \
	ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v redis-server >/dev/null || missing="$$missing redis-server"; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ]; then \
		echo "make: installs$$missing"; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	else \
		echo "make: tests that need these packages are skipped:$$missing; as root: apt-get install$$missing" >&2; \
	fi

$(LIGHT): requirements-demo.lock pyproject.toml | system-light
	@if [ -L $(VENV) ]; then echo 'make: $(VENV) is a link, and making it anew would empty what it leads to' >&2; exit 1; fi
	$(SAY) 'makes $(VENV), with the run-time alone: about half a minute, 110 MB'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP_INSTALL) --require-hashes -r requirements-demo.lock
	@$(PIP_INSTALL) --no-build-isolation -e .
	@$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@

$(INSTALLED): requirements.lock $(LIGHT) | system
	$(SAY) 'adds what tests and checks need to $(VENV): a minute or two, 1.2 GB'
	@$(PIP_INSTALL) --require-hashes -r requirements.lock
	@$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@

check: lint types public layers declared package  ## format, lint, types, public names, layers, declared imports, what is uploaded

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

public: setup
	$(BIN)/python tests/package/public_types.py

layers: setup
	$(BIN)/lint-imports --no-logo

declared: setup
	$(BIN)/deptry vmibridge handlers --optional-dependencies-dev-groups bench,demo,dev,test,test-libraries
	$(BIN)/deptry . benchmarks docker guest/linux tests tests/*/ tests/unit/handlers

package: setup  ## wheel and sdist in dist/, checked as an index and an installer would
	@rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# More workers than there are cores, as many tests wait for a child or for a peer that is silent. Without
# compiled modules each command that a test runs would compile them again. A test that hangs ends its
# worker, which says where it stood; the longest takes half a minute, or some minutes on a machine with other work.
WORKERS := $(shell echo $$(( $$(nproc) < 3 ? $$(nproc) + 4 : 6 )))
HANGS := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

test: export PYTHONDONTWRITEBYTECODE :=
test: setup test-guests .pytest_cache/rewritten  ## all tests but the slow ones, with coverage, in up to six processes; minutes
	$(PYTEST) -q -n $(WORKERS) --dist worksteal $(HANGS) --cov --cov-report=term

# pytest rewrites the assertions of each file once and keeps the result. Where there is none yet, as in a
# fresh clone, all workers would do the same work at the same time.
.pytest_cache/rewritten: export PYTHONDONTWRITEBYTECODE :=
.pytest_cache/rewritten: $(shell find tests -name '*.py') | setup
	@echo 'make: tests are compiled'
	@# What fails here fails with the tests, and is told there.
	@printf '%s\n' "tests/unit" "$$(ls -d tests/*/ | grep -v -e unit/ -e helpers/ -e __pycache__ | tr '\n' ' ')" | \
		xargs -P 2 -I FOLDERS sh -c '$(PYTEST) --collect-only -qq FOLDERS >/dev/null' || true
	@mkdir -p $(@D) && touch $@

# What many tests need. Without, a plain user's tests are skipped and say so; those of root fail.
test-guests: setup
	@guest/qemu/fetch-qemu || echo "make: tests that need QEMU 11.1 cannot run" >&2
	@{ guest/linux/fetch-linux && guest/linux/build-guest; } || echo "make: tests that need a Linux guest cannot run" >&2

# The compilers of guests: clang, g++, mingw and Debian's Rust.
system-guests:
	@missing=; \
	command -v clang++ >/dev/null || missing="$$missing clang"; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	command -v rustc >/dev/null || missing="$$missing rustc"; \
	command -v x86_64-w64-mingw32-gcc >/dev/null || missing="$$missing gcc-mingw-w64-x86-64"; \
	command -v i686-w64-mingw32-gcc >/dev/null || missing="$$missing gcc-mingw-w64-i686"; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ]; then \
		echo "make: installs$$missing"; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y $$missing; \
	else \
		echo "make: tests that need these packages are skipped:$$missing; as root: apt-get install$$missing" >&2; \
	fi

test-slow: setup system-guests  ## the tests that take long, and every law with all of its examples
	$(PYTEST) -q -m slow
	VMIBRIDGE_LAWS=long $(PYTEST) -q -m 'hypothesis and not slow'

test-install: setup  ## installs the core, each extra and the demo from nothing; minutes
	$(PYTEST) -q -m install tests/install

# VMIBRIDGE_LIBRARY_REQUESTS=50000 is the long form: about two hours.
test-libraries: setup system-libraries  ## libraries that handlers use against PostgreSQL, Redis and a web server of their own; minutes
	$(PYTEST) -q -m libraries tests/libraries

test-matrix: setup  ## the tests on every Python that is supported, and installs on those that are here; long
	VMIBRIDGE_PYTHONS=all $(PYTEST) -q -m install tests/install
	$(BIN)/python tests/install/matrix.py

soak: setup  ## 1,000,000 traps with faults over 64 lanes, on asyncio and on trio; minutes
	$(BIN)/python tests/soak/fault_soak.py --loop asyncio
	$(BIN)/python tests/soak/fault_soak.py --loop trio

demo: $(LIGHT)  ## a real guest calls the ready-made handlers and checks every answer
	@$(BIN)/vmibridge demo

# The command looks in no folder of its own accord: a checkout's QEMU is named to it.
demo-linux demo-linux-device bench: export VMIBRIDGE_QEMU = $(wildcard $(CURDIR)/.qemu/qemu-system-x86_64)

demo-linux: setup qemu linux  ## a real Linux in QEMU calls from programs and from its kernel
	@$(BIN)/python guest/linux/demo.py

demo-linux-device: setup qemu linux  ## the same guest calls by a PCI device: through sysfs and by its driver
	@$(BIN)/python guest/linux/demo.py --via device

bench: setup qemu linux  ## what a trap costs, and how many may wait; minutes, pinned to one core
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/lanes.py
	$(BIN)/python benchmarks/waiting.py
	$(BIN)/python benchmarks/recording.py
	$(BIN)/python benchmarks/qemu_plugin.py
	$(BIN)/python benchmarks/qemu_gdb.py
	$(BIN)/python benchmarks/qemu_device.py
	$(BIN)/python benchmarks/device_memory.py
	$(BIN)/python benchmarks/file_transfer.py
	$(BIN)/python benchmarks/linux_boot.py
	$(BIN)/python benchmarks/remote.py

qemu:  ## QEMU 11.1 in .qemu, for the plugin: linked to, or unpacked from Debian's packages
	@guest/qemu/fetch-qemu

linux: system  ## a Linux guest in .linux: Debian's kernel and busybox, with programs and a module of ours
	@guest/linux/fetch-linux
	@guest/linux/build-guest

guest-tools: setup  ## vmib, a program for guests, in build/guest-tools: for Linux, and for Windows with mingw-w64
	@$(BIN)/vmibridge guest tools -o build/guest-tools

plugin: setup  ## the QEMU plugin, .qemu/vmibridge-plugin.so
	@$(BIN)/vmibridge qemu build-plugin -o .qemu/vmibridge-plugin.so

# One file a module for C and for nasm; for Rust, where each file stands alone, one of all.
guest-headers: setup  ## guest/include/handlers, made of the ready-made handlers
	@for file in handlers/[a-z]*.py; do \
		name=$$(basename $$file .py); \
		$(BIN)/vmibridge guest-header vmibridge.handlers.$$name --lang c -o guest/include/handlers/$$name.h && \
		$(BIN)/vmibridge guest-header vmibridge.handlers.$$name --lang asm -o guest/include/handlers/$$name.inc || exit 1; \
	done
	@$(BIN)/vmibridge guest-header vmibridge.handlers --lang rust -o guest/include/handlers/handlers.rs

# podman needs the others to run containers with networks, and names netavark and iptables nowhere; debootstrap
# makes the images that others build upon where no registry can be reached.
system-containers:
	@missing=; \
	for each in podman runc debootstrap iptables; do \
		command -v $$each >/dev/null || [ -x /usr/sbin/$$each ] || missing="$$missing $$each"; \
	done; \
	for each in netavark aardvark-dns; do \
		[ -x /usr/lib/podman/$$each ] || [ -x /usr/libexec/podman/$$each ] || missing="$$missing $$each"; \
	done; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "make: installs$$missing"; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	else \
		echo "make: containers need these packages:$$missing; as root: apt-get install$$missing" >&2; \
	fi

images: setup  ## the images of docker/ and those that its profiles take as they are, with podman or docker
	@docker info >/dev/null 2>&1 || $(MAKE) --no-print-directory system-containers
	@$(BIN)/python docker/build_images.py

test-containers: setup linux system-containers  ## builds the images and runs them side by side, with podman; minutes
	$(PYTEST) -q -rs -m containers tests/containers

# The build backend is among both: the checkout is installed by it, without one of its own.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	--generate-hashes --no-strip-extras --no-annotate --no-header

lock: setup  ## lock the newest versions that pyproject.toml allows
	$(COMPILE) --upgrade --all-extras pyproject.toml -o requirements.lock
	sed -nE 's/^([a-z0-9.-]+)(\[[^]]*\])?==([^ ]+).*/\1==\3/p' requirements.lock | \
		$(COMPILE) --constraints - --extra demo pyproject.toml -o requirements-demo.lock

clean:  ## remove what the other targets made
	rm -rf $(VENV) .qemu .linux .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
