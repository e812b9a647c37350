# The README's two commands: `make demo` and `make test`. Both set up a virtual environment first.
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
FIXRES = $(VENV)/bin/fixres
SIZES = 96,128,160,192,224,256

.PHONY: setup demo test check clean
setup: $(VENV)/ready

$(VENV)/ready: setup.cfg setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e .[dev]
	touch $@

demo: setup
	$(FIXRES) submit --data demo --name demo --cluster local --gpus-per-node 1
	$(FIXRES) submit --data demo --name demo-control --cluster local --gpus-per-node 1 \
		--weights runs/demo/pretrained.safetensors --res 128 pretrain=none
	$(FIXRES) sweep --run runs/demo --also control=runs/demo-control --res $(SIZES) --activations
	$(FIXRES) report runs/demo runs/demo-control

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: setup check
	$(PY) -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

clean:
	rm -rf $(VENV) runs build *.egg-info
