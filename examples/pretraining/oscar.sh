#!/usr/bin/env bash
# OSCAR (any version from 2019 to 23.01), from download to fairseq-train:
#
#   bash examples/pretraining/oscar.sh OUT [more flags for fairseq-train]
#
# CORPUS    a folder of OSCAR files, or hf://OWNER/NAME (default: hf://oscar-corpus/OSCAR-2301; it is gated: accept its
#           terms on the hub and set HF_TOKEN)
# LANGUAGE  subcorpus (default: en from the hub, all languages of a local folder)
# WORKERS   processes for preparing and binarising (default: all cores)
#
# Run it again to go on where it stopped, at whatever stage that was.
set -euo pipefail
source "$(dirname "$0")/../../scripts/recipe.sh"
[ $# -ge 1 ] || { echo "usage: [CORPUS=...] bash examples/pretraining/oscar.sh OUT [fairseq-train flags]" >&2; exit 2; }
CORPUS=${CORPUS:-hf://oscar-corpus/OSCAR-2301}
case $CORPUS in hf://*) LANGUAGE=${LANGUAGE:-en} ;; *) CORPUS=$(absolute "$CORPUS") ;; esac
claim "$1"
OUT=$(absolute "$1")
shift
WORKERS=${WORKERS:-$(getconf _NPROCESSORS_ONLN)}
cd "$(dirname "$0")/../.."
source scripts/environment.sh
export PYTHONWARNINGS=ignore

# download: every file is compared with the hub's checksum, an interrupted one goes on where it stopped
case $CORPUS in
    hf://*)
        run python -m fairseq_implicit prepare-corpus "$CORPUS" --hub-folder "$OUT/download" --output "$OUT/prepared" \
            --hub-files "${LANGUAGE}_meta/*.jsonl.*" --download-only
        CORPUS=$OUT/download/${CORPUS#hf://}
        ;;
esac
if [ -n "${LANGUAGE:-}" ] && [ -d "$CORPUS/${LANGUAGE}_meta" ]; then CORPUS=$CORPUS/${LANGUAGE}_meta; fi

TRIAL=no SHARD_SIZE=4GB VALID_FRACTION=0.00001 # of a terabyte: about 10 MB, for validation reads all of it every time
if [ "$(du -sk "$CORPUS" | cut -f1)" -lt 1000000 ]; then TRIAL=yes SHARD_SIZE=400KB VALID_FRACTION=0.1; fi

# clean text shards. The labels tiny, noisy and adult drop a document; OSCAR since 22.01 is not deduplicated
run python -m fairseq_implicit prepare-corpus "$CORPUS" --valid-fraction "$VALID_FRACTION" --max-document-size 1MB \
    --output "$OUT/prepared" --shard-size "$SHARD_SIZE" --workers "$WORKERS"

source examples/pretraining/train_on_shards.sh
