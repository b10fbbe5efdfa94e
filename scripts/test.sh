#!/usr/bin/env bash
# The test suite in the project's own environment. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh tests/solvers -x -k order
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
source scripts/environment.sh
# Tensors in tests are small: a second thread would only wait for the first, and spin while another program works.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The whole suite takes a process per core, and each file stays in one: what its tests share is made once.
if [ $# -eq 0 ]; then
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
    set -- --numprocesses $((cores < 8 ? cores : 8)) --dist loadfile --no-loadscope-reorder
fi
exec python -m pytest "$@"
