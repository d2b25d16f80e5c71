#!/usr/bin/env bash
# Installs what the tests need into .venv, then runs ruff, mypy and pytest. Arguments go to pytest:
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
# one hash seed, since all workers must list the same tests in the same order
PYTHONHASHSEED=0 python -m pytest -n 2 "$@"
