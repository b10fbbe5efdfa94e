#!/usr/bin/env bash
# DEQ-BERT at base size: the equilibrium of one cell with the parameters of twelve layers. Every number in sight:
#
#   bash examples/pretraining/deq.sh DATA OUT [more flags for fairseq-train]
#
# DATA is a folder of binarised text with its dict.txt and sentencepiece.bpe.model, as ode_bert_base.sh makes it (steps
# 0 to 2); OUT receives checkpoints and logs. Run it again to resume. How to choose: examples/deq/README.md.
set -euo pipefail
source "$(dirname "$0")/../../scripts/recipe.sh"
[ $# -ge 2 ] || { echo "usage: bash examples/pretraining/deq.sh DATA OUT [fairseq-train flags]" >&2; exit 2; }
for file in dict.txt sentencepiece.bpe.model; do
    [ -f "$1/$file" ] || { echo "deq: $1 holds no $file: make it with steps 0 to 2 of ode_bert_base.sh" >&2; exit 2; }
done
DATA=$(absolute "$1")
claim "$2"
OUT=$(absolute "$2")
shift 2
cd "$(dirname "$0")/../.."
source scripts/environment.sh
export PYTHONWARNINGS=ignore

ARCH=deq_bert_base         # one pre-norm layer with a final norm, 768 wide, feed-forward 53,760
TOKENS_PER_SAMPLE=512
BATCH=16                   # sequences per GPU and step
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" = 0 ]; then GPUS=1; fi # a CPU
PRECISION=$(python -m fairseq_implicit precision) # --fp16 on a GPU, --bf16 on a CPU that has it, else float32
UPDATE_FREQ=$((2048 / BATCH / GPUS > 0 ? 2048 / BATCH / GPUS : 1)) # 2,048 sequences per update on any number of GPUs
PEAK_LR=0.00025            # half of RoBERTa's: the cell's weights act at every evaluation
WARMUP_UPDATES=10000
TOTAL_UPDATES=125000

mkdir -p "$OUT/checkpoints"
cp "$DATA/dict.txt" "$DATA/sentencepiece.bpe.model" "$OUT/checkpoints/"
run fairseq-train "$DATA" --user-dir "$root/fairseq_implicit" \
    --task implicit_masked_lm --criterion implicit_masked_lm --arch "$ARCH" \
    --deq-warmup-updates 12500 --deq-warmup-steps 4 \
    --deq-solver anderson --deq-max-iter 24 --deq-gradient ift --deq-adjoint-max-iter 24 \
    --deq-budget-jitter 2 --deq-monitor-interval 500 \
    --deq-jacobian-weight 0.1 --deq-jacobian-frequency 0.2 \
    --sample-break-mode complete --tokens-per-sample "$TOKENS_PER_SAMPLE" \
    --mask-prob 0.15 --leave-unmasked-prob 0.1 --random-token-prob 0.1 \
    --dropout 0.1 --attention-dropout 0 --weight-decay 0 --clip-norm 1.0 \
    --optimizer adam --adam-betas '(0.9,0.98)' --adam-eps 1e-6 \
    --lr "$PEAK_LR" --lr-scheduler polynomial_decay \
    --warmup-updates "$WARMUP_UPDATES" --total-num-update "$TOTAL_UPDATES" --max-update "$TOTAL_UPDATES" \
    --batch-size "$BATCH" --update-freq "$UPDATE_FREQ" ${PRECISION:+"$PRECISION"} \
    --distributed-world-size "$GPUS" --ddp-backend legacy_ddp \
    --save-dir "$OUT/checkpoints" --save-interval-updates 1000 --keep-interval-updates 2 --no-epoch-checkpoints \
    --save-on-signal --validate-interval-updates 1000 --tensorboard-logdir "$OUT/tensorboard" \
    --log-format simple --log-interval 100 --seed 1 "$@"
what_now "$OUT"
