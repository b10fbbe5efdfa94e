#!/usr/bin/env bash
# A corpus prepared and binarised by a SLURM cluster, one array task per share of the files:
#
#   CORPUS=/data/pile OUT=/scratch/pile-prepared bash examples/pretraining/slurm_array.sh submit
#
# submits four jobs that wait for each other: an array that reads the files, an array that writes the shards, one task
# that verifies and joins them and trains the tokenizer, and an array that binarises. The tools take their part from
# SLURM's own variables. A task that fails or is killed can be submitted again: what is finished is kept, and the
# result is the same.
#
# CORPUS    files or folders, separated by spaces      OUT     folder that all nodes see
# TASKS     array tasks (default 30)                   FLAGS   more flags of prepare_corpus.py
#SBATCH --job-name=corpus
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=12:00:00
set -euo pipefail
STAGE=${1:?usage: CORPUS=... OUT=... bash slurm_array.sh submit}
: "${CORPUS:?set CORPUS to the files or folders of the corpus}" "${OUT:?set OUT to a folder that all nodes see}"
TASKS=${TASKS:-30}
WORKERS=${SLURM_CPUS_PER_TASK:-8}
export CORPUS OUT TASKS FLAGS=${FLAGS:-} ROOT=${ROOT:-$(cd "$(dirname "$0")/../.." && pwd)}
SCRIPT=$ROOT/examples/pretraining/slurm_array.sh
# CORPUS and FLAGS are lists of words.
# shellcheck disable=SC2086
prepare() { "$ROOT/.venv/bin/python" "$ROOT/scripts/prepare_corpus.py" $CORPUS --output "$OUT/prepared" --workers "$WORKERS" $FLAGS "$@"; }

case $STAGE in
    submit)
        mkdir -p "$OUT/logs"
        submit() { sbatch --parsable --export=ALL --output="$OUT/logs/%x-%A_%a.log" "$@"; }
        read_job=$(submit --array="0-$((TASKS - 1))" --job-name=corpus-read "$SCRIPT" read)
        write_job=$(submit --array="0-$((TASKS - 1))" --job-name=corpus-write --dependency="afterok:$read_job" "$SCRIPT" write)
        join_job=$(submit --job-name=corpus-join --dependency="afterok:$write_job" "$SCRIPT" join)
        submit --array="0-$((TASKS - 1))" --job-name=corpus-binarise --dependency="afterok:$join_job" "$SCRIPT" binarise
        ;;
    read) prepare ;; # the part comes from SLURM_ARRAY_TASK_ID
    write) prepare --merge --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" ;;
    join)
        prepare --merge
        "$ROOT/.venv/bin/python" "$ROOT/scripts/train_tokenizer.py" "$OUT/prepared" --preset bert-32k \
            --out "$OUT/tokenizer/sentencepiece.bpe.model"
        ;;
    binarise) # the part comes from SLURM_ARRAY_TASK_ID
        "$ROOT/.venv/bin/python" "$ROOT/scripts/binarise_corpus.py" "$OUT/prepared" --workers "$WORKERS" --fast \
            --tokenizer "$OUT/tokenizer/sentencepiece.bpe.model" --output "$OUT/data-bin"
        ;;
    *) echo "unknown stage $STAGE: use submit" >&2; exit 2 ;;
esac
