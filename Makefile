PYTHON ?= python
# -P keeps the current folder off sys.path: from here `kernels` would be importable under that name,
# which other libraries probe for.
RUN = $(PYTHON) -P -m

.PHONY: check lint types test wheel

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

# A stale build/lib would put deleted files into the wheel.
wheel:
	rm -rf build dist
	$(RUN) build --wheel
