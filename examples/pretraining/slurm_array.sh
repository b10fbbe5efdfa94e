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
# TOKENIZER flags of train_tokenizer.py (default --preset bert-32k)
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
export CORPUS OUT TASKS FLAGS=${FLAGS:-} TOKENIZER=${TOKENIZER:---preset bert-32k}
export ROOT=${ROOT:-$(cd "$(dirname "$0")/../.." && pwd)}
SCRIPT=$ROOT/examples/pretraining/slurm_array.sh
PYTHON=$ROOT/.venv/bin/python

# CORPUS, FLAGS and TOKENIZER are lists of words.
# shellcheck disable=SC2086
prepare() {
    "$PYTHON" "$ROOT/scripts/prepare_corpus.py" $CORPUS --output "$OUT/prepared" --workers "$WORKERS" $FLAGS "$@"
}

submit() { # stage, sbatch flags: prints the job's number
    local stage=$1
    shift
    sbatch --parsable --export=ALL --job-name="corpus-$stage" --output="$OUT/logs/%x-%A_%a.log" "$@" "$SCRIPT" "$stage"
}

case $STAGE in
    submit)
        mkdir -p "$OUT/logs"
        array=(--array="0-$((TASKS - 1))")
        read_job=$(submit read "${array[@]}")
        write_job=$(submit write "${array[@]}" --dependency="afterok:$read_job")
        join_job=$(submit join --dependency="afterok:$write_job")
        submit binarise "${array[@]}" --dependency="afterok:$join_job"
        ;;
    read) prepare ;; # the part comes from SLURM_ARRAY_TASK_ID
    write) prepare --merge --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" ;;
    join)
        prepare --merge
        # shellcheck disable=SC2086
        "$PYTHON" "$ROOT/scripts/train_tokenizer.py" "$OUT/prepared" $TOKENIZER \
            --out "$OUT/tokenizer/sentencepiece.bpe.model"
        ;;
    binarise) # the part comes from SLURM_ARRAY_TASK_ID
        "$PYTHON" "$ROOT/scripts/binarise_corpus.py" "$OUT/prepared" --workers "$WORKERS" --fast \
            --tokenizer "$OUT/tokenizer/sentencepiece.bpe.model" --output "$OUT/data-bin"
        ;;
    *) echo "unknown stage $STAGE: use submit" >&2; exit 2 ;;
esac
