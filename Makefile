# kimi-stack: `make serve` and `make test` are the two commands to know. `make help` lists the rest.
PYTHON ?= python3.11
MODEL ?= models/checkpoints/tiny-attnres
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
# Where `pip install torch` would take a CUDA build, name the index of PyTorch's CPU wheels, e.g.
#   make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu
export TORCH_INDEX

NOX := .nox/bootstrap/bin/nox
VLLM := .nox/vllm
SOURCES := $(shell git ls-files kernels models plugins cli CMakeLists.txt pyproject.toml noxfile.py 2>/dev/null)

.PHONY: help serve test test-stacks bench lint doctor clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

serve: $(VLLM)/.ready ## an OpenAI-compatible vLLM server with a small trained Kimi Linear model (MODEL=, HOST=, PORT=, ARGS=)
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} $(VLLM)/bin/vllm serve $(MODEL) \
	  --served-model-name $(notdir $(MODEL)) --host $(HOST) --port $(PORT) $(ARGS)

test: $(NOX) ## lint, kernels, models, MuonClip, a real vLLM server; each stack in its own environment
	$(NOX)

test-stacks: $(NOX) ## Triton kernels, interpreted and compiled; real Megatron, NIXL over links that break, verl training
	$(NOX) -s triton megatron nixl verl

lint: $(NOX) ## ruff, mypy, import rules
	$(NOX) -s lint

bench: $(VLLM)/.ready ## the benchmarks of this machine (several minutes; nothing else should run)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m benchmarks.cpu_kda
	$(VLLM)/bin/python -m benchmarks.vllm_cpu

doctor: $(VLLM)/.ready ## what is installed, what would load, which kernels run here
	$(VLLM)/bin/kimi-stack doctor

clean: ## remove environments and build products
	rm -rf .nox build

$(NOX):
	$(PYTHON) -m venv .nox/bootstrap
	.nox/bootstrap/bin/pip install -q nox==2026.10.20

# The server and the vllm tests share one environment; it is made again when the sources change.
$(VLLM)/.ready: $(NOX) $(SOURCES)
	$(NOX) -s vllm -- serve
	@touch $@
