PYTHON ?= python
# -P keeps the current folder off sys.path: from here `kernels` would be importable under that name,
# which other libraries probe for.
RUN = $(PYTHON) -P -m

.PHONY: check lint types test gpu wheel

check: lint types test

lint:
	$(RUN) ruff format --check .
	$(RUN) ruff check .

types:
	mkdir -p build/ns
	ln -sfn ../.. build/ns/fluxkontext
	$(RUN) mypy

test:
	$(RUN) pytest

# On a machine with a GPU: whether everything is right there, then how fast; documents go to $(OUT).
# What fails does not keep the rest from running.
OUT ?= build/gpu
# Without torch's pools, which would hide that a kernel reads beyond its tensors.
SANITIZED = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 $(RUN) pytest \
	-m "gpu and not large"
BENCH = $(PYTHON) -P -m fluxkontext.runtime.cli bench
gpu:
	mkdir -p $(OUT)
	-$(RUN) pytest -m gpu | tee $(OUT)/tests.txt
	-$(SANITIZED) tests/kernels | tee $(OUT)/sanitizer.txt
	-$(BENCH) quality --backend native --precision fp32,bf16,fp8,nvfp4 --steps 8 --samples 134 \
		--chains 0 --batch 64 --out $(OUT)/quality
	-$(BENCH) kernels --out $(OUT)/kernels.json
	-$(BENCH) gpu --out $(OUT)/gpu.json
	-$(BENCH) gpu --sustain 0 --precision fp8:attend=fp8 --vram-budget 14GiB \
		--out $(OUT)/gpu-14GiB.json
	-$(BENCH) gpu --sustain 0 --precision nvfp4 --vram-budget 9GiB \
		--out $(OUT)/gpu-9GiB.json
	-$(BENCH) compare --spec full --cold 0 --precision fp8 --kernel attend=fp8 \
		--peers diffusers --out $(OUT)/compare-fp8-all.json
	-$(BENCH) compare --spec full --cold 0 --precision fp8 \
		--peers diffusers-torchao-fp8 --out $(OUT)/compare-fp8-linears.json
	-$(BENCH) report $(OUT)/*.json -o $(OUT)/report.html

# A stale build/lib would put deleted files into the wheel.
wheel:
	rm -rf build dist
	$(RUN) build --wheel
