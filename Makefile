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

.DEFAULT_GOAL := help
.PHONY: help deps run test lint format bench clean lock bpf

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: $(VENV)/.stamp ## install what is missing: Debian packages (as root) and a locked virtual environment

run: deps bpf ## the main job: simulated devices (DEVICES=20) over MQTT into a function, SECONDS=20
	@$(BIN)/weir run --routes examples/telemetry/routes.yaml --devices $(or $(DEVICES),20) \
		--for $(or $(SECONDS),20) --verify /count -- $(BIN)/python examples/telemetry/function.py

test: deps bpf ## run every test this machine can run; the skipped ones say why
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: deps ## ruff, mypy --strict, import layers, clang-format, clang -Werror
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/mypy -p weir && $(BIN)/mypy tests bench examples
	$(BIN)/lint-imports
	clang-format --dry-run --Werror $(BPF_SRC)
	$(MAKE) --no-print-directory -B bpf

format: deps ## rewrite the sources in the house format
	$(BIN)/ruff format . && $(BIN)/ruff check --fix . && clang-format -i $(BPF_SRC)

bench: deps bpf $(VENV)/.bench ## measure the direct path, the relay and the adaptor against nothing at all (ratios in one run)
	$(BIN)/python -m bench

bpf: $(BPF) ## compile the eBPF object

$(BPF): $(BPF_SRC)
	$(CLANG) $(BPF_FLAGS) -c bpf/weir.bpf.c -o $@
	llvm-strip -g $@ 2>/dev/null || $$(ls /usr/bin/llvm-strip-[0-9]* | sort -V | tail -n 1) -g $@

$(VENV)/.stamp: requirements.lock deps.sh pyproject.toml
	./deps.sh $(PYTHON) $(VENV)
	@touch $@

$(VENV)/.bench: deps.sh
	./deps.sh $(PYTHON) $(VENV) bench
	@touch $@

lock: ## resolve the Python dependencies anew into requirements.lock
	$(BIN)/pip install --quiet uv && $(BIN)/uv pip compile --quiet --upgrade pyproject.toml --extra broker --group dev \
		--universal --generate-hashes --python-version 3.11 --custom-compile-command "make lock" -o requirements.lock

clean: ## remove everything that was built or installed here
	rm -rf $(VENV) $(BPF) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
