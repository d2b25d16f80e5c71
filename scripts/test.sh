#!/usr/bin/env bash
# Install the test dependencies into .venv, then run ruff, mypy, import-linter and pytest. Arguments are pytest's:
#     bash scripts/test.sh tests/recipe/test_read.py -k typo
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install.sh dev

ruff check .
ruff format --check .
mypy --strict arpo_trl
for platform in win32 darwin; do
    mypy --strict --platform $platform --cache-dir .mypy_cache/$platform arpo_trl
done
lint-imports
# A fixed hash seed: all workers have to collect the same tests in the same order.
PYTHONHASHSEED=0 python -m pytest -n 2 "$@"
