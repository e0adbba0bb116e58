PYTHON ?= python
# -P keeps the current folder off sys.path: from here `kernels` would be importable under that name,
# which other libraries probe for.
RUN = $(PYTHON) -P -m

.PHONY: check lint types test gpu wheel

check: lint types test

lint:
	$(RUN) ruff format --check .
	$(RUN) ruff check .

types: | build/ns
	$(RUN) mypy

# Where the packages of this checkout are found without being installed.
build/ns:
	mkdir -p build/ns
	ln -sfn ../.. build/ns/fluxkontext

test:
	$(RUN) pytest

# On a machine with a GPU: whether everything is right there, then how fast, part by part; documents
# go to $(OUT). What fails does not keep the rest from running, and nothing needs to be installed. A
# copy without history says of what commit it is: FLUXKONTEXT_COMMIT=... make gpu
OUT ?= build/gpu
GPU = gpu-tests gpu-kernels gpu-speed gpu-memory gpu-compare gpu-quality
BENCH = $(PYTHON) -P -m fluxkontext.runtime.cli bench
.PHONY: $(GPU)
gpu: $(GPU)

# Without an empty entry, which would be the current folder.
$(GPU): export PYTHONPATH := $(CURDIR)/build/ns$(if $(PYTHONPATH),:$(PYTHONPATH))
$(GPU): | build/ns $(OUT)
$(OUT):
	mkdir -p $@

# The second run without torch's pools, which would hide that a kernel reads beyond its tensors.
gpu-tests:
	-$(RUN) pytest -m gpu --continue-on-collection-errors | tee $(OUT)/tests.txt
	-PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 $(RUN) pytest \
		-m "gpu and not large" tests/kernels | tee $(OUT)/sanitizer.txt

gpu-kernels:
	-$(BENCH) kernels --out $(OUT)/kernels.json

gpu-speed:
	-$(BENCH) gpu --out $(OUT)/gpu.json

gpu-memory:
	-$(BENCH) gpu --sustain 0 --headline --precision fp8:attend=fp8 --vram-budget 14GiB \
		--out $(OUT)/gpu-14GiB.json
	-$(BENCH) gpu --sustain 0 --headline --precision nvfp4 --vram-budget 9GiB \
		--out $(OUT)/gpu-9GiB.json

# The second needs torchao.
gpu-compare:
	-$(BENCH) compare --spec full --cold 0 --precision fp8 --kernel attend=fp8 --rounds 5 \
		--peers diffusers-bf16 --out $(OUT)/compare-fp8-all.json
	-$(BENCH) compare --spec full --cold 0 --precision fp8 --rounds 5 \
		--peers diffusers-torchao-fp8 --out $(OUT)/compare-fp8-linears.json

gpu-quality:
	-$(BENCH) quality --backend native --precision fp32,bf16,fp8,nvfp4 --steps 8 --samples 134 \
		--chains 0 --batch 64 --out $(OUT)/quality

# A stale build/lib would put deleted files into the wheel.
wheel:
	rm -rf build dist
	$(RUN) build --wheel
