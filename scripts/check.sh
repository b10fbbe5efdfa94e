#!/usr/bin/env bash
# Lint, formatting and types, in the project's own environment; `bash scripts/check.sh --fix` mends what ruff can mend.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
fix=''
case ${1:-} in
    '') ;;
    --fix) fix=yes ;;
    *) echo "check: unknown option $1 (there is --fix)" >&2; exit 2 ;;
esac
source scripts/environment.sh
if [ -n "$fix" ]; then
    ruff check --fix
    ruff format
else
    ruff check
    ruff format --check
fi
mypy
