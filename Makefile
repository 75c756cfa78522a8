# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# some images set it: then every process of the tests compiles all of them anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-slow check docs format bench clean

setup: $(STAMP)

# torch first and pinned: a looser request may pull gigabytes of CUDA libraries
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt torch==2.13.0 numpy
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[all,dev,bench]'
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/update-watch demo --out demo-out $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(STAMP)
	$(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "slow and not gpu" $(ARGS)

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy -p update_watch

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet --site-dir build/site
	$(VENV)/bin/update-watch report --force -o build/site/demo-report.html docs/demo/bf16.jsonl docs/demo/fp32-masters.jsonl

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(STAMP)
	$(PY) bench/startup.py
	$(PY) bench/overhead.py
	$(PY) bench/truth.py --jobs 2
	$(PY) bench/forecast.py
	$(PY) bench/what_if.py
	$(PY) bench/planted/divergence.py
	$(PY) bench/coverage.py
	$(PY) bench/bf16/remainders.py
	$(PY) bench/scale.py
	$(PY) bench/scenarios.py
	$(PY) bench/ranks.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
