# Each target is one line that a person could type. PROFILE, DATASET, DATA_ROOT, GRID, SPLIT, TILES, FOREGROUNDS,
# CATEGORY, METHODS, VARIANTS, SEEDS, UNTIL and CORES are handed to `python -m defectlib reproduce`.
PROFILE ?= demo
DATASET ?= mini
PY := .venv/bin/python
OPTIONS = --profile "$(PROFILE)" --dataset "$(DATASET)" $(if $(DATA_ROOT),--data-root "$(DATA_ROOT)") \
  $(if $(GRID),--grid "$(GRID)") $(if $(SPLIT),--split "$(SPLIT)") $(if $(TILES),--tiles "$(TILES)") \
  $(if $(CATEGORY),--category "$(CATEGORY)") $(if $(METHODS),--methods "$(METHODS)") $(if $(SEEDS),--seeds "$(SEEDS)") \
  $(if $(VARIANTS),--variants "$(VARIANTS)") $(if $(UNTIL),--until "$(UNTIL)") \
  $(if $(CORES),--cores "$(CORES)") $(if $(FOREGROUNDS),--foregrounds "$(FOREGROUNDS)")

.PHONY: reproduce claims test env lock notebooks figures backbone bench lint doctor

reproduce: .venv/complete  ## nine executed notebooks, the tables and the figures
	$(PY) -m defectlib reproduce $(OPTIONS)

claims: .venv/complete  ## the papers' claims tested over three seeds, on the methods and variants that they compare
	$(MAKE) reproduce SEEDS=0,1,2 VARIANTS=claimed

test: .venv/complete  ## unit tests, then all notebooks through nbval on reduced settings
	$(PY) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder
	rm -rf runs/test
	DEFECTLIB_RUNS=$(CURDIR)/runs/test DEFECTLIB_PROFILE=smoke $(PY) -m pytest notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout 900 -n 2 --dist loadfile

env: .venv/complete  ## the locked environment in .venv: by uv where it is present, else by pip

.venv/complete: requirements.lock pyproject.toml
	test -x $(PY) || python3.11 -m venv .venv || python3 -m venv .venv
	if command -v uv >/dev/null; then uv pip install --python $(PY) --require-hashes -r requirements.lock && uv pip install --python $(PY) --no-deps --no-build-isolation -e .; \
	else $(PY) -m ensurepip >/dev/null && $(PY) -m pip install --no-deps --require-hashes -r requirements.lock && $(PY) -m pip install --no-deps --no-build-isolation -e .; fi
	touch $@

lock:  ## renew requirements.lock from pyproject.toml
	uv pip compile pyproject.toml --extra test --universal --generate-hashes --no-emit-index-url --no-emit-find-links --python-version 3.11 -o requirements.lock

notebooks: .venv/complete  ## execute the committed notebooks in place under the demo profile
	$(PY) -m defectlib notebooks --profile demo

figures: .venv/complete  ## tables and report.html again, from the runs that are there
	$(PY) -m defectlib report --profile "$(PROFILE)" --dataset "$(DATASET)" $(if $(SPLIT),--split "$(SPLIT)")

backbone: .venv/complete  ## train the small base model: some five hours on two cores, less on a GPU; resumable
	$(PY) -m defectlib.pretrain

bench: .venv/complete  ## every benchmark; each prints one JSON line last
	for file in benchmarks/*.py; do $(PY) $$file || exit 1; done

lint: .venv/complete
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

doctor: .venv/complete
	$(PY) -m defectlib doctor
