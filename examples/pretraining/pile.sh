#!/usr/bin/env bash
# The Pile, from download to fairseq-train:
#
#   bash examples/pretraining/pile.sh OUT [more flags for fairseq-train]
#
# CORPUS   a folder in The Pile's layout (train/*.jsonl.zst, val.jsonl.zst, test.jsonl.zst), or hf://OWNER/NAME
#          (default: hf://monology/pile-uncopyrighted, about 350 GB of downloads)
# WORKERS  processes for preparing and binarising (default: all cores)
#
# Run it again to go on where it stopped, at whatever stage that was.
set -euo pipefail
source "$(dirname "$0")/../../scripts/recipe.sh"
[ $# -ge 1 ] || { echo "usage: [CORPUS=...] bash examples/pretraining/pile.sh OUT [fairseq-train flags]" >&2; exit 2; }
CORPUS=${CORPUS:-hf://monology/pile-uncopyrighted}
case $CORPUS in hf://*) ;; *) CORPUS=$(absolute "$CORPUS") ;; esac
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
            --hub-files 'train/*.jsonl.zst' --hub-files 'val.jsonl.zst' --hub-files 'test.jsonl.zst' --download-only
        CORPUS=$OUT/download/${CORPUS#hf://}
        ;;
esac

TRIAL=no SHARD_SIZE=4GB HELD_OUT_SAMPLE=0.004 # of 1.3 GB each: about 5 MB, for validation reads all of it every time
if [ "$(du -sk "$CORPUS" | cut -f1)" -lt 1000000 ]; then TRIAL=yes SHARD_SIZE=1MB HELD_OUT_SAMPLE=1; fi

# clean text shards. Removing duplicates also takes away the several passes over the better components that the files
# contain; --pile-epochs puts them back, mixed over all shards
run python -m fairseq_implicit prepare-corpus "$CORPUS/train" --valid-input "$CORPUS/val.jsonl.zst" \
    --test-input "$CORPUS/test.jsonl.zst" --held-out-sample "$HELD_OUT_SAMPLE" --pile-epochs \
    --output "$OUT/prepared" --shard-size "$SHARD_SIZE" --workers "$WORKERS"

source examples/pretraining/train_on_shards.sh
