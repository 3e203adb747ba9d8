# Everything is installed into .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint report clean

demo: .venv/.runtime
	$(BIN)/python examples/demo.py

test: .venv/.test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The small model measured on held-out pictures, by a judge that is trained apart from it; on photographs, a kind that it
# never saw; and which scales it reads, by six short tunings. What is there is not done anew.
report: .venv/.test | data/emoji-evaluation data/stamps runs/emoji/judge runs/emoji/cache
	$(BIN)/python examples/emoji/report.py
	$(BIN)/python examples/emoji/report.py --data data/stamps --out runs/emoji/report-stamps --count 32
	$(BIN)/python examples/emoji/compare_scales.py --steps 80

data/emoji: | .venv/.test
	$(BIN)/python examples/emoji/build_dataset.py --out $@

data/emoji-scenes: | data/emoji
	$(BIN)/python examples/emoji/build_scenes.py --out $@

data/emoji-evaluation: | data/emoji-scenes
	$(BIN)/python examples/emoji/emoji_evaluation.py --out $@

data/stamps: | .venv/.test
	$(BIN)/python examples/emoji/build_stamps.py --out $@

runs/emoji/cache: | data/emoji-scenes
	$(BIN)/python examples/emoji/take_parts.py --model hub_configs/puma-emoji
	$(BIN)/python examples/emoji/cache_features.py --out $@

runs/emoji/judge: | data/emoji
	$(BIN)/python examples/emoji/train_judge.py --out $@

lint: .venv/.test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.runtime: .venv/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.test: .venv/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/.runtime

clean:
	rm -rf .venv build dist src/*.egg-info
