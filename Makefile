# Sets up and runs everything from a bare machine with Python 3.10 or newer, git and make.
#
#   make test     environment, lint, tests (tests/host too where a ComfyUI is found)
#   make demo     videos of three prompts and of a picture from the built-in model, and whether they show what was asked
#   make lint     ruff only
#   make bench    our transformer and VAE beside diffusers' and ComfyUI's
#   make record   the host's description of our nodes, for the tests that have no host (needs a ComfyUI)
#   make workflows  workflows/*.json, their pictures and those of the help pages, by the real front-end (needs a ComfyUI, node, playwright-core, Chromium)
#   make clean    remove the environment and what demo wrote
#
# PYTHON       the interpreter that makes the environment
# VENV         the environment; one that already has torch keeps it
# TORCH        what to ask pip for where torch is missing
# TORCH_INDEX  an extra package index for it, such as PyTorch's index of CPU builds, which are a tenth of the size
# COMFYUI_PATH a ComfyUI checkout for tests/host and demo (else it is looked for as README.md says)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
READY := $(VENV)/.open-sora-ready

# The tests' tensors are tiny: more threads only wait for each other, most of all on shared cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: test demo lint bench record workflows clean
.DEFAULT_GOAL := test

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch first and pinned from then on, so that no other package can replace it by a build with gigabytes of CUDA.
$(READY): pyproject.toml | $(PY)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) $(TORCH) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PY) -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(VENV)/constraints.txt
	$(PIP) --constraint $(VENV)/constraints.txt --editable ".[test]"
	touch $(READY)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test: lint
	$(PY) -m pytest -q

demo: $(READY)
	$(PY) -m demo.run

bench: $(READY)
	$(PIP) --constraint $(VENV)/constraints.txt --editable ".[bench]"
	$(PY) -m benchmarks.transformer_forward
	$(PY) -m benchmarks.vae_decode
	$(PY) -m benchmarks.preflight

record: $(READY)
	$(PY) -m demo.host_record
	$(PY) -m demo.help_pages

workflows: $(READY)
	PYTHONPATH=. $(PY) tests/browser/build_workflows.py
	PYTHONPATH=. $(PY) tests/browser/thumbnails.py
	PYTHONPATH=. $(PY) tests/browser/help_pictures.py

clean:
	rm -rf $(VENV) demo/out
