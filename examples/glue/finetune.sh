#!/usr/bin/env bash
# Fine-tunes a pretrained checkpoint on one GLUE task with fairseq's own sentence_prediction:
#
#   bash examples/glue/finetune.sh GLUE_FOLDER/RTE RTE quickstart/embedded/ode_bert_rk2_tiny OUT [fairseq-train flags]
#
# The first folder holds train.tsv and dev.tsv in GLUE's columns, the third checkpoint_best.pt, dict.txt and
# sentencepiece.bpe.model, as the recipes of this project leave them.
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: bash examples/glue/finetune.sh TABLES TASK PRETRAINED OUT [fairseq-train flags]" >&2; exit 2; }
TABLES=$1 TASK=$2 PRETRAINED=$3 OUT=$4
shift 4

# RoBERTa's settings of each task: classes, learning rate, batch, updates
case $TASK in
    CoLA) CLASSES=2 LR=1e-5 BATCH=16 UPDATES=5336 ;;
    MNLI) CLASSES=3 LR=1e-5 BATCH=32 UPDATES=123873 ;;
    MRPC) CLASSES=2 LR=1e-5 BATCH=16 UPDATES=2296 ;;
    QNLI) CLASSES=2 LR=1e-5 BATCH=32 UPDATES=33112 ;;
    QQP) CLASSES=2 LR=1e-5 BATCH=32 UPDATES=113272 ;;
    RTE) CLASSES=2 LR=2e-5 BATCH=16 UPDATES=2036 ;;
    SST-2) CLASSES=2 LR=1e-5 BATCH=32 UPDATES=20935 ;;
    STS-B) CLASSES=1 LR=2e-5 BATCH=16 UPDATES=3598 ;;
    WNLI) CLASSES=2 LR=1e-5 BATCH=16 UPDATES=400 ;;
    *) echo "finetune: unknown task $TASK: CoLA MNLI MRPC QNLI QQP RTE SST-2 STS-B WNLI" >&2; exit 2 ;;
esac
for file in checkpoint_best.pt dict.txt sentencepiece.bpe.model; do
    [ -f "$PRETRAINED/$file" ] || { echo "finetune: $PRETRAINED holds no $file: pretrain first" >&2; exit 1; }
done
TABLES=$(cd "$TABLES" && pwd) PRETRAINED=$(cd "$PRETRAINED" && pwd)
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/../.."
source scripts/environment.sh
export PYTHONWARNINGS=ignore
USER_DIR=$(python -m fairseq_implicit)

# 1. tables -> lines
python examples/glue/columns.py "$TABLES" --task "$TASK" --out "$OUT/lines"

# 2. lines -> tokens, sentences with the dictionary of pretraining, labels with one of their own
VALID=valid
if [ -f "$OUT/lines/valid1.label" ]; then VALID=valid,valid1; fi
prefixes() { # --trainpref and --validpref of input0, input1 or label
    echo --trainpref "$OUT/lines/train.$1" --validpref "${VALID//valid/$OUT/lines/valid}" | sed "s/\(valid1\?\)\(,\|$\)/\1.$1\2/g"
}
rm -rf "$OUT/data-bin"
for part in input0 input1; do
    [ -f "$OUT/lines/train.$part" ] || continue
    # shellcheck disable=SC2046
    fairseq-preprocess --user-dir "$USER_DIR" --task implicit_masked_lm --only-source \
        --srcdict "$PRETRAINED/sentencepiece.bpe.model" $(prefixes $part) --destdir "$OUT/data-bin/$part" --workers 2
done
if [ "$CLASSES" = 1 ]; then # a score is read from text
    mkdir -p "$OUT/data-bin/label"
    for split in ${VALID//,/ } train; do cp "$OUT/lines/$split.label" "$OUT/data-bin/label/"; done
    OBJECTIVE=(--regression-target --best-checkpoint-metric loss)
else
    # shellcheck disable=SC2046
    fairseq-preprocess --only-source $(prefixes label) --destdir "$OUT/data-bin/label" --workers 2
    OBJECTIVE=(--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric)
fi

# 3. fine-tuning: the flags of the pretrained model come from its checkpoint
mkdir -p "$OUT/checkpoints"
cp "$PRETRAINED/sentencepiece.bpe.model" "$OUT/checkpoints/"
PRECISION=(--fp16)
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then PRECISION=(); fi
# shellcheck disable=SC2046
fairseq-train "$OUT/data-bin" --user-dir "$USER_DIR" $(python scripts/checkpoint_flags.py "$PRETRAINED/checkpoint_best.pt") \
    --finetune-from-model "$PRETRAINED/checkpoint_best.pt" \
    --task sentence_prediction --criterion sentence_prediction --num-classes "$CLASSES" \
    --init-token 0 --separator-token 2 --shorten-method truncate \
    --dropout 0.1 --attention-dropout 0.1 --weight-decay 0.1 --clip-norm 0.0 \
    --optimizer adam --adam-betas '(0.9,0.98)' --adam-eps 1e-6 \
    --lr "$LR" --lr-scheduler polynomial_decay --warmup-updates $((UPDATES * 6 / 100)) \
    --total-num-update "$UPDATES" --max-update "$UPDATES" --max-epoch 10 \
    --batch-size "$BATCH" --required-batch-size-multiple 1 "${PRECISION[@]}" \
    --valid-subset "$VALID" "${OBJECTIVE[@]}" \
    --save-dir "$OUT/checkpoints" --no-epoch-checkpoints --distributed-world-size 1 \
    --log-format simple --log-interval 50 --seed 1 "$@"
