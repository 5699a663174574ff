# `make demo` and `make test` set everything up in .venv first. They need Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.ready
DATA := data/demo
OUT := outputs

.PHONY: setup demo test quick lint constraints clean

setup: $(SETUP)

$(SETUP): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -e ".[dev]"
	touch $@

demo: $(SETUP)
	$(BIN)/python -m isic synth --output_dir $(DATA) --images 3000
	$(BIN)/python -m train --config demo --data $(DATA) --output_dir $(OUT) --resume
	$(BIN)/python -m export --config demo --model_dir $(OUT)/demo
	$(BIN)/python -m infer embed --config demo --model_dir $(OUT)/demo --data $(DATA) --output_dir $(OUT)/embeddings
	for features in image raw engineered multimodal; do \
		$(BIN)/python -m infer fit --features $$features --data $(DATA) \
			--embeddings $(OUT)/embeddings/demo --output_dir $(OUT)/ensemble || exit; \
	done
	$(BIN)/python -m infer predict --ensemble $(OUT)/ensemble/multimodal_demo --data $(DATA) \
		--embeddings $(OUT)/embeddings/demo --output $(OUT)/submission.csv
	$(BIN)/python -m infer triage --ensemble $(OUT)/ensemble/multimodal_demo --data $(DATA) \
		--embeddings $(OUT)/embeddings/demo --maps $(OUT)/demo --max_patients 5 --output $(OUT)/triage.html
	$(BIN)/python -m infer scores --output_dir $(OUT)/ensemble
	@echo "submission: $(OUT)/submission.csv, pages of patients: $(OUT)/triage.html"

# A browser, a Ray cluster or a GPU serves one test at a time.
test: quick
	$(BIN)/python -m pytest -n auto --dist worksteal -m "slow and not browser and not ray and not gpu"
	$(BIN)/python -m pytest -m "browser or ray or gpu"

# Without the tests that take long, start a browser or a Ray cluster, or need a GPU: about five minutes on two cores.
quick: $(SETUP)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not browser and not ray and not gpu"

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The versions that the tests have passed with, for `pip install -c constraints.txt`.
constraints: $(SETUP)
	$(BIN)/pip freeze --disable-pip-version-check --exclude-editable >constraints.txt

clean:
	rm -rf .venv data/demo outputs build *.egg-info
