# Weir's tasks. Plain `make` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CLANG  ?= $(shell command -v clang || ls /usr/bin/clang-[0-9]* 2>/dev/null | sort -V | tail -n 1)
BPF    := bpf/weir.bpf.o
BPF_SRC := $(wildcard bpf/*.h bpf/*.bpf.c)
# one object for every kernel: only stable (UAPI) structs are read, so no vmlinux.h and no relocations
BPF_FLAGS := -O2 -g -target bpf -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter \
	-I/usr/include/$(shell uname -m)-linux-gnu

HOLD     := hold/weir-hold
HOLD_SRC := $(wildcard hold/*.c hold/*.h)
BENCH_SRC := $(wildcard bench/c/*.c bench/c/*.h)
INIT_SRC := tests/machine/init.c
# static, because it is all there is in its image; musl's is a tenth of glibc's
HOLD_CC  ?= $(shell command -v musl-gcc || command -v gcc || command -v cc)
HOLD_FLAGS := -std=gnu11 -Os -Wall -Wextra -Werror -static -s \
	-idirafter /usr/include -idirafter /usr/include/$(shell uname -m)-linux-gnu

# where the package is that has its request path compiled, and how a command gets it
FAST     := dist/compiled
COMPILED := WEIR_COMPILED=1 PYTHONPATH=$(CURDIR)/$(FAST)
CAN_COMPILE = command -v gcc >/dev/null && \
	[ -e "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]

.DEFAULT_GOAL := help
.PHONY: image e2e-up e2e-down e2e-smoke e2e-conformance e2e-upstream e2e-deps
.PHONY: help deps run test test-compiled test-kernels lint format bench clean lock bpf hold compiled

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: $(VENV)/.stamp ## install what is missing: Debian packages (as root) and a locked virtual environment

run: deps bpf ## the main job: simulated devices (DEVICES=20) over MQTT into a function, SECONDS=20
	@$(BIN)/weir run --routes examples/telemetry/routes.yaml --devices $(or $(DEVICES),20) \
		--for $(or $(SECONDS),20) --verify /count -- $(BIN)/python examples/telemetry/function.py

test: deps bpf hold ## run every test this machine can run; the skipped ones say why
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	@if $(CAN_COMPILE); then $(MAKE) --no-print-directory test-compiled; \
		else echo "the compiled request path is not tested: no C compiler, or no Python.h (make deps, as root)"; fi

test-compiled: compiled ## run the tests of the relay, the sidecar and the contract against the compiled package
	$(COMPILED) $(BIN)/python -P -m pytest --import-mode=importlib $(PYTEST_ARGS) \
		tests/relay tests/sidecar tests/contract

test-kernels: deps bpf hold $(VENV)/.machine ## run the kernel side's tests on Debian's other kernels, under qemu (KERNELS="6.1 newest", hours)
	$(BIN)/python -m tests.machine $(KERNELS)

lint: deps ## ruff, mypy --strict, import layers, clang-format, clang -Werror
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/mypy -p weir && $(BIN)/mypy tests bench examples
	$(BIN)/lint-imports
	clang-format --dry-run --Werror $(BPF_SRC) $(HOLD_SRC) $(BENCH_SRC) $(INIT_SRC)
	$(CLANG) -std=gnu11 -fsyntax-only -Wall -Wextra -Werror $(filter %.c,$(BENCH_SRC)) $(INIT_SRC)
	$(MAKE) --no-print-directory -B bpf hold

format: deps ## rewrite the sources in the house format
	$(BIN)/ruff format . && $(BIN)/ruff check --fix . && clang-format -i $(BPF_SRC) $(HOLD_SRC) $(BENCH_SRC) $(INIT_SRC)

bench: deps bpf compiled $(VENV)/.bench ## measure the direct path, the relay and the adaptor against nothing at all (ratios in one run)
	$(BIN)/python -m bench

image: deps bpf hold ## build the container images without Docker: dist/weir.tar, dist/weir-hold.tar (IMAGE_NAME=, HOLD_IMAGE_NAME=, IMAGE_PYTHON=)
	$(BIN)/python -m image dist/weir.tar --name $(or $(IMAGE_NAME),dev.local/weir:dev) \
		--hold dist/weir-hold.tar --hold-name $(or $(HOLD_IMAGE_NAME),dev.local/weir-hold:dev) \
		--python $(or $(IMAGE_PYTHON),/usr/bin/python3)

e2e-deps: deps
	tests/cluster/deps.sh

e2e-up: e2e-deps ## start Kubernetes + Knative Serving on this machine (root, Go; the first build takes 6 min)
	$(BIN)/python -m tests.cluster up

e2e-down: ## stop them; nothing stays but the build cache
	$(BIN)/python -m tests.cluster down

e2e-smoke: e2e-deps bpf hold ## up, image, overlay, the cluster tests, down
	$(BIN)/python -m tests.cluster up
	{ $(BIN)/python -m tests.cluster images && WEIR_CLUSTER=1 $(BIN)/python -m pytest tests/cluster; }; \
		status=$$?; $(BIN)/python -m tests.cluster down; exit $$status

e2e-conformance: e2e-deps bpf hold ## up, image, overlay, upstream's runtime conformance suite; stays up
	$(BIN)/python -m tests.cluster up
	$(BIN)/python -m tests.cluster images
	$(BIN)/python -m tests.cluster kubectl apply -k manifests/overlays/sidecar
	$(BIN)/python -m tests.cluster.suites runtime

e2e-upstream: e2e-deps bpf hold ## up, image, overlay, what of upstream's end-to-end suite a sidecar has to do with; stays up
	$(BIN)/python -m tests.cluster up
	$(BIN)/python -m tests.cluster images
	$(BIN)/python -m tests.cluster kubectl apply -k manifests/overlays/sidecar
	$(BIN)/python -m tests.cluster.suites e2e

compiled: deps $(FAST)/.stamp ## compile the request path with mypyc, beside the sources: dist/compiled

$(FAST)/.stamp: hatch_build.py pyproject.toml $(BPF) $(wildcard proxy/*.py proxy/*/*.py proxy/*/*/*.py adaptor/*.py weir/*.py weir/*/*.py)
	rm -rf $(FAST) dist/wheel
	WEIR_COMPILE=1 $(BIN)/python -m hatchling build -t wheel -d dist/wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(FAST) dist/wheel/*.whl
	@touch $@

bpf: $(BPF) ## compile the eBPF object

$(BPF): $(BPF_SRC)
	$(CLANG) $(BPF_FLAGS) -c bpf/weir.bpf.c -o $@
	llvm-strip -g $@ 2>/dev/null || $$(ls /usr/bin/llvm-strip-[0-9]* | sort -V | tail -n 1) -g $@

hold: $(HOLD) ## compile weir-hold, which owns a pod's listeners (docs/hold.md)

$(HOLD): $(HOLD_SRC)
	$(HOLD_CC) $(HOLD_FLAGS) -o $@ hold/hold.c hold/ports.c

$(VENV)/.stamp: requirements.lock deps.sh pyproject.toml
	./deps.sh $(PYTHON) $(VENV)
	@touch $@

$(VENV)/.bench: deps.sh
	./deps.sh $(PYTHON) $(VENV) bench
	@touch $@

$(VENV)/.machine: deps.sh
	./deps.sh $(PYTHON) $(VENV) machine
	@touch $@

lock: ## resolve the Python dependencies anew into requirements.lock
	$(BIN)/pip install --quiet uv && $(BIN)/uv pip compile --quiet --upgrade pyproject.toml --extra broker --group dev \
		--universal --generate-hashes --python-version 3.11 --custom-compile-command "make lock" -o requirements.lock

clean: ## remove everything that was built or installed here
	rm -rf $(VENV) $(BPF) $(HOLD) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
