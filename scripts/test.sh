#!/usr/bin/env bash
# The test suite in the project's own environment. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh tests/solvers -x -k order
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
source scripts/environment.sh
# Tensors in tests are small: a second thread would only wait for the first, and spin while another program works.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest "$@"
