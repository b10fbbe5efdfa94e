#!/usr/bin/env bash
# Fine-tunes a pretrained checkpoint on one GLUE task with fairseq's own sentence_prediction:
#
#   bash examples/glue/finetune.sh GLUE_FOLDER/RTE RTE quickstart/embedded/ode_bert_rk2_tiny OUT [fairseq-train flags]
#
# The first folder holds train.tsv and dev.tsv in GLUE's columns, the third a checkpoint. Its dictionary and tokenizer
# are looked for beside it, then in the data folder that it was trained on.
set -euo pipefail
source "$(dirname "$0")/../../scripts/recipe.sh"
[ $# -ge 4 ] || { echo "usage: bash examples/glue/finetune.sh TABLES TASK PRETRAINED OUT [fairseq-train flags]" >&2; exit 2; }
TABLES=$1 TASK=$2 PRETRAINED=$3 OUT=$4
shift 4

# RoBERTa's settings of each task (classes, learning rate, batch, updates), and GLUE's metric
case $TASK in
    CoLA) CLASSES=2 LR=1e-5 BATCH=16 UPDATES=5336 METRIC=mcc ;;
    MNLI) CLASSES=3 LR=1e-5 BATCH=32 UPDATES=123873 METRIC=accuracy ;;
    MRPC) CLASSES=2 LR=1e-5 BATCH=16 UPDATES=2296 METRIC=acc_and_f1 ;;
    QNLI) CLASSES=2 LR=1e-5 BATCH=32 UPDATES=33112 METRIC=accuracy ;;
    QQP) CLASSES=2 LR=1e-5 BATCH=32 UPDATES=113272 METRIC=acc_and_f1 ;;
    RTE) CLASSES=2 LR=2e-5 BATCH=16 UPDATES=2036 METRIC=accuracy ;;
    SST-2) CLASSES=2 LR=1e-5 BATCH=32 UPDATES=20935 METRIC=accuracy ;;
    STS-B) CLASSES=1 LR=2e-5 BATCH=16 UPDATES=3598 METRIC=pearson_and_spearman ;;
    WNLI) CLASSES=2 LR=1e-5 BATCH=16 UPDATES=400 METRIC=accuracy ;;
    *) echo "finetune: unknown task $TASK: CoLA MNLI MRPC QNLI QQP RTE SST-2 STS-B WNLI" >&2; exit 2 ;;
esac
TABLES=$(absolute "$TABLES")
PRETRAINED=$(absolute "$PRETRAINED")
claim "$OUT"
OUT=$(absolute "$OUT")
source "$(dirname "$0")/../../scripts/environment.sh" # sets root
export PYTHONWARNINGS=ignore

inputs=$(printf '%s\n' "$TASK" "$TABLES" "$PRETRAINED")
if [ -f "$OUT/checkpoints/checkpoint_last.pt" ]; then # go on, with the classes and ids that its weights were trained on
    [ "$(cat "$OUT/inputs" 2>/dev/null)" = "$inputs" ] ||
        fail "finetune: $OUT was made from other arguments, or by an earlier version: choose another folder"
else
    # 1. tables -> lines
    rm -rf "$OUT/lines" "$OUT/data-bin"
    run python "$root/examples/glue/columns.py" "$TABLES" --task "$TASK" --out "$OUT/lines"

    # 2. lines -> ids, by the tokenizer and the dictionary of pretraining
    run python "$root/examples/glue/binarise.py" "$OUT/lines" --pretrained "$PRETRAINED" --out "$OUT/data-bin"
    echo "$inputs" >"$OUT/inputs"
fi

# 3. fine-tuning: the flags of the pretrained model come from its checkpoint
flags=$(python -m fairseq_implicit checkpoint-flags "$PRETRAINED" --finetune)
eval "MODEL=($flags)" # they are quoted for the shell
VALID=valid
if [ -f "$OUT/lines/valid1.label" ]; then VALID=valid,valid1; fi
OBJECTIVE=(--num-classes "$CLASSES" --best-checkpoint-metric "$METRIC" --maximize-best-checkpoint-metric)
if [ "$CLASSES" = 1 ]; then OBJECTIVE+=(--regression-target); fi
# --report-mcc, --report-acc-and-f1, --report-pearson-and-spearman: computed over the whole set, in one process only
if [ "$METRIC" != accuracy ]; then OBJECTIVE+=("--report-${METRIC//_/-}"); fi
PRECISION=$(python -m fairseq_implicit precision) # --fp16 on a GPU, --bf16 on a CPU that has it, else float32
run fairseq-train "$OUT/data-bin" --user-dir "$root/fairseq_implicit" "${MODEL[@]}" \
    --task sentence_prediction --criterion sentence_prediction --init-token 0 --separator-token 2 \
    --dropout 0.1 --attention-dropout 0.1 --weight-decay 0.1 --clip-norm 0.0 \
    --optimizer adam --adam-betas '(0.9,0.98)' --adam-eps 1e-6 \
    --lr "$LR" --lr-scheduler polynomial_decay --warmup-updates $((UPDATES * 6 / 100)) \
    --total-num-update "$UPDATES" --max-update "$UPDATES" --max-epoch 10 \
    --batch-size "$BATCH" --required-batch-size-multiple 1 \
    --valid-subset "$VALID" "${OBJECTIVE[@]}" ${PRECISION:+"$PRECISION"} \
    --save-dir "$OUT/checkpoints" --no-epoch-checkpoints --distributed-world-size 1 --save-on-signal \
    --log-format simple --log-interval 50 --seed 1 "$@"
best=$OUT/checkpoints/checkpoint_best.pt
if [ -f "$best" ]; then echo "the best checkpoint by $METRIC: $best (examples/glue/README.md predicts with it)"; fi
