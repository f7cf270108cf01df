# Each target sets up all that it needs on a fresh machine: Python 3.11 or later and a package registry.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
STACKS := $(VENV)/.stacks
DOCS   := $(VENV)/.docs

.PHONY: train test test-all integrations sanitize check docs bench wheel format clean

train: $(STAMP)          ## GraNet to 90 % sparsity beside its dense twin, on real data, with a report at the end
	$(BIN)/granet train --twin

test: $(STACKS)          ## the tests, doctests of the README, docs and docstrings included; without those marked slow
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-all: $(STACKS)      ## every test, the slow ones too: processes that are killed, whole grids, sanitizers
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

integrations: $(STACKS)  ## granet inside Lightning, transformers, accelerate, timm, peft and others, the slow tests too
	$(BIN)/python -m pytest -q tests/integrations tests/sparsifier/test_quantised.py docs/integrations.md src/granet/integrations

sanitize: $(STAMP)       ## the kernels under AddressSanitizer and UndefinedBehaviorSanitizer; takes minutes
	GRANET_SANITIZE=1 $(BIN)/python -m pytest -q --timeout 1800 tests/engine/test_sanitizers.py

check: $(STAMP)          ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/clang-format --dry-run --Werror src/granet/native/csrc/*

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i src/granet/native/csrc/*

docs: $(DOCS)            ## the documentation site, in build/site; warnings are errors, and nothing is fetched
	rm -rf build/docs build/site
	mkdir -p build/docs
	cp -R *.md LICENSE CITATION.cff docs results examples src tests build/docs  # with their places, so that links between them hold
	find build/docs -name __pycache__ -prune -exec rm -rf {} +
	$(BIN)/python .ci/command_line_page.py > build/docs/docs/api/command-line.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

bench: $(STAMP)          ## upkeep of the masks against the official procedure
	$(BIN)/python benchmarks/upkeep.py

# auditwheel names the oldest Linux that the library's symbols allow, and refuses what needs anything else than torch. CXX may
# be a compiler for another processor. The same commit gives the same files: times are those of the commit.
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 1577836800)
wheel: $(STAMP)          ## the packages to publish, in dist: one with compiled kernels, one without, and the sources
	rm -rf build/wheel
	$(BIN)/python -m hatchling build -d dist
	GRANET_KERNELS=1 $(BIN)/python -m hatchling build -t wheel -d build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude libtorch_cpu.so -w dist build/wheel/*.whl
	@ls -l dist

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "python3-venv is missing: installing it"; \
	  apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[train,images]" --group dev
	-@$(BIN)/python -m granet.native
	@touch $@

$(STACKS): $(STAMP)      # the stacks that granet is tested inside of: 600 MB
	$(BIN)/python -m pip install -q -c constraints.txt --group integrations
	@touch $@

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt --group docs
	@touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache
