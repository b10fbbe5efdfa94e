#!/usr/bin/env bash
# The test suite in the project's own environment. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh tests/solvers -x -k order
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
exec python -m pytest "$@"
