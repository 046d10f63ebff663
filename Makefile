# Needs an environment with the development extra: pip install -c constraints.txt -e '.[dev]'
.PHONY: check test bench

check:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

test:
	python -m pytest

bench:
	python benchmarks/train_cpu.py
