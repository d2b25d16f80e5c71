#!/usr/bin/env bash
# Installs what the tests need into .venv, then runs ruff, mypy and pytest. Arguments go to pytest:
#     bash scripts/test.sh tests/recipe/test_read.py -k typo
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install.sh dev

ruff check .
ruff format --check .
mypy --strict arpo_trl
lint-imports
python -m pytest "$@"
