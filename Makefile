# Everything runs in .venv, which `make` creates. `make help` lists the targets.
PYTHON ?= python3
# Has torch, Triton and transformers; nothing is downloaded.
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check gpu kernels lint types tree quality checkpoints fuzz fuzz-server kills traps bench bench-avx passes-time \
  coverage-archs docs goldens clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "setuptools>=77" wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)  ## calibrate, quantize and compile the demo model; print quality and speed
	$(BIN)/python -P -m qcompile demo

test: $(STAMP) lint types  ## lint, types, and every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

gpu:  ## on a machine with an NVIDIA GPU: its tests, its tiles, the benchmark; writes lowering/tiles, docs/benchmarks (10 minutes)
	$(GPU_PYTHON) -P scripts/gpu.py

kernels: $(STAMP)  ## compile every form of the Triton kernel for every GPU of the table; a long interpreter run (ten minutes)
	QCOMPILE_EVERY_KERNEL=1 QCOMPILE_KERNEL_EXAMPLES=2000 OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/lowering/test_scaled_mm_kernel.py

quality: $(STAMP)  ## accuracy on real models and texts, if ../shared/data is there
	for model in stories260K babyllama361; do $(BIN)/python -P scripts/measure_quality.py ../shared/data/models/$$model \
	  --text ../shared/data/text/tinystories_valid.txt --calibration ../shared/data/text/tinystories_train_sample.txt; done

checkpoints: $(STAMP)  ## quality, size and memory of checkpoints, if ../shared/data is there
	$(BIN)/python -P scripts/measure_checkpoints.py ../shared/data --json build/checkpoints.json

fuzz: $(STAMP)  ## load 10,000 broken checkpoints
	QCOMPILE_FUZZ=10000 QCOMPILE_FUZZ_SEED=1000 OMP_NUM_THREADS=1 $(BIN)/pytest -q -s tests/properties/test_broken_checkpoints.py

fuzz-server: $(STAMP)  ## send 2,000 broken bodies to the server
	QCOMPILE_FUZZ_BODIES=2000 OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/serving/test_http_app.py -k bodies

kills: $(STAMP)  ## kill the writer 500 times
	QCOMPILE_KILLS=500 OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/end_to_end/test_killed_writer.py

traps: $(STAMP)  ## smooth 5,000 random models with traps, in ten parts of other seeds (three hours)
	seq 10 | HYPOTHESIS_PROFILE=long QCOMPILE_EXAMPLES=500 OMP_NUM_THREADS=1 xargs -P 2 -I PART \
	  $(BIN)/pytest -q tests/properties/test_smoothing_exact.py --hypothesis-seed=PART

bench-avx: $(STAMP)  ## speed of products on a CPU without VNNI, against float32 (three minutes)
	$(BIN)/python -P scripts/measure_avx.py

bench: $(STAMP)  ## speed on this CPU: two shapes against Inductor and torchao, and a roofline (fifty minutes)
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev,bench]"
	for shape in llama-100m llama-400m; do $(BIN)/python -P -m qcompile bench $$shape; done
	$(BIN)/python -P scripts/measure_cpu.py
	$(BIN)/python -P scripts/measure_rest.py
	$(BIN)/python -P scripts/measure_small.py

passes-time: $(STAMP)  ## seconds that the passes take on 40 and 80 layers of Llama-70B's shape
	$(BIN)/python -P scripts/measure_passes.py

coverage-archs: $(STAMP)  ## every architecture of transformers, tiny; writes docs/architectures.md (half an hour)
	PYTHONPATH=tests $(BIN)/python -P -m architectures.run --json build/architectures.json --page docs/architectures.md
	QCOMPILE_EVERY_MIXTURE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 tests/architectures/test_stored_experts.py

docs: $(STAMP)  ## write docs/options.md and docs/passes.md, which come from the code
	$(BIN)/python -P scripts/generate_docs.py

goldens: $(STAMP)  ## write the golden texts of graphs again; look at the difference before committing it
	$(BIN)/python -P tests/golden_graphs.py

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .

types: $(STAMP) tree  ## mypy --strict, over the packages as they are installed
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p qcompile

tree:  # type checkers do not follow the editable install's import hook, so they get a tree of links
	mkdir -p build/tree/qcompile
	find build/tree/qcompile -xtype l -delete
	ln -sfn $(CURDIR)/qcompile/* build/tree/qcompile/
	ln -sfn $(CURDIR)/passes $(CURDIR)/lowering build/tree/qcompile/

clean:  ## remove what make created
	rm -rf $(VENV) build qcompile.egg-info
