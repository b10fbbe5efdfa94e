#!/usr/bin/env bash
# A corpus prepared and binarised by a SLURM cluster, one array task per share of the files:
#
#   CORPUS=/data/pile OUT=/scratch/pile-prepared bash examples/pretraining/slurm_array.sh submit
#
# makes the environment, if there is none yet, and submits four jobs that wait for each other: an array that reads the
# files, an array that writes the shards, one task that verifies and joins them and trains the tokenizer, and an array
# that binarises. The tools take their part from SLURM's own variables. A task that fails or is killed can be submitted
# again: what is finished is kept, and the result is the same. A task whose time ends is told so two minutes before and
# goes back into the queue.
#
# CORPUS    a file or folder, or several separated by spaces (where a name holds a space, by line breaks)
# OUT       folder that all nodes see                  TASKS   array tasks (default 30)
# FLAGS     more flags of prepare-corpus               TOKENIZER  flags of train-tokenizer (default --preset bert-32k)
#SBATCH --job-name=corpus
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
usage='usage: CORPUS=... OUT=... bash examples/pretraining/slurm_array.sh submit'
stage=${1:?$usage}
# SLURM runs a copy of this file from a folder of its own, so that `submit` says where the checkout is.
root=${2:-$(CDPATH="" cd "$(dirname "$0")/../.." && pwd)}
source "$root/scripts/recipe.sh"
recipe=slurm_array
: "${CORPUS:?$usage}" "${OUT:?$usage}"
TASKS=${TASKS:-30} FLAGS=${FLAGS:-} TOKENIZER=${TOKENIZER:---preset bert-32k}
WORKERS=${SLURM_CPUS_PER_TASK:-8}
python=$root/.venv/bin/python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# FLAGS and TOKENIZER are lists of words.
read -ra flags <<<"$FLAGS"
read -ra tokenizer_flags <<<"$TOKENIZER"
case $CORPUS in
    *$'\n'*) readarray -t corpus <<<"$CORPUS" ;;
    *) if [ -e "$CORPUS" ]; then corpus=("$CORPUS"); else read -ra corpus <<<"$CORPUS"; fi ;;
esac

prepare() {
    run "$python" -m fairseq_implicit prepare-corpus "${corpus[@]}" --output "$OUT/prepared" --workers "$WORKERS" \
        "${flags[@]}" "$@"
}

submit() { # stage, sbatch flags: prints the job's number
    local stage=$1
    shift
    sbatch --parsable --export=ALL --job-name="corpus-$stage" --output="$OUT/logs/%x-%A_%a.log" "$@" \
        "$root/examples/pretraining/slurm_array.sh" "$stage" "$root"
}

stopped() { # at the end of its time a task waits for another turn; its own number would stand for the whole array
    if [ "$1" = USR1 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    fi
}

case $stage in
    submit)
        source "$root/scripts/environment.sh"
        mkdir -p -- "$OUT/logs"
        OUT=$(absolute "$OUT")
        for number in "${!corpus[@]}"; do
            case ${corpus[number]} in hf://*) ;; *) corpus[number]=$(absolute "${corpus[number]}") ;; esac
        done
        CORPUS=$(printf '%s\n' "${corpus[@]}")
        export CORPUS OUT TASKS FLAGS TOKENIZER
        array=(--array="0-$((TASKS - 1))")
        read_job=$(submit read "${array[@]}")
        write_job=$(submit write "${array[@]}" --dependency="afterok:$read_job")
        join_job=$(submit join --dependency="afterok:$write_job")
        last_job=$(submit binarise "${array[@]}" --dependency="afterok:$join_job")
        echo "submitted $read_job, $write_job, $join_job and $last_job; their logs are in $OUT/logs. When the last has ended:"
        echo "  fairseq-train \"\$(cat $(command_line "$OUT/data-bin/data-bin.txt"))\" --user-dir $(command_line \
            "$root/fairseq_implicit") --task implicit_masked_lm ..."
        ;;
    read) prepare ;; # the part comes from SLURM_ARRAY_TASK_ID
    write) prepare --merge --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" ;;
    join)
        prepare --merge
        run "$python" -m fairseq_implicit train-tokenizer "$OUT/prepared" "${tokenizer_flags[@]}" \
            --out "$OUT/tokenizer/sentencepiece.bpe.model"
        ;;
    binarise) # the part comes from SLURM_ARRAY_TASK_ID
        run "$python" -m fairseq_implicit binarise "$OUT/prepared" --workers "$WORKERS" --fast \
            --tokenizer "$OUT/tokenizer/sentencepiece.bpe.model" --output "$OUT/data-bin"
        ;;
    *) fail "slurm_array: unknown stage $stage: use submit" ;;
esac
