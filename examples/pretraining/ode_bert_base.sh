#!/usr/bin/env bash
# The quickstart at base size with the hyper-parameters of RoBERTa, every number in sight:
#
#   bash examples/pretraining/ode_bert_base.sh TEXT OUT [more flags for fairseq-train]
#
# TEXT is a text file or a folder of them, OUT receives everything. Run it again to resume.
# DICTIONARY  symbols in the dictionary (default: 32000)
set -euo pipefail
source "$(dirname "$0")/../../scripts/recipe.sh"
[ $# -ge 2 ] || { echo "usage: bash examples/pretraining/ode_bert_base.sh TEXT OUT [fairseq-train flags]" >&2; exit 2; }
TEXT=$(absolute "$1")
claim "$2"
OUT=$(absolute "$2")
shift 2
cd "$(dirname "$0")/../.."
source scripts/environment.sh
export PYTHONWARNINGS=ignore

ARCH=ode_bert_rk2_base     # 12 blocks of width 768, two evaluations each; ode_bert_euler_base is BERT itself
DICTIONARY=${DICTIONARY:-32000} # a multiple of 64, below 65,500 so that a token takes two bytes on disk
TOKENS_PER_SAMPLE=512      # longest sequence
BATCH=16                   # sequences per GPU and step
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" = 0 ]; then GPUS=1; fi # a CPU
PRECISION=$(python -m fairseq_implicit precision) # --fp16 on a GPU, --bf16 on a CPU that has it, else float32
UPDATE_FREQ=$((2048 / BATCH / GPUS > 0 ? 2048 / BATCH / GPUS : 1)) # 2,048 sequences per update on any number of GPUs
PEAK_LR=0.0005
WARMUP_UPDATES=10000
TOTAL_UPDATES=125000

# 0. text -> one paragraph per line, blank line between documents, train/valid/test
[ -d "$OUT/corpus" ] || run python -m fairseq_implicit text-corpus "$TEXT" --out "$OUT/corpus"

# 1. sentencepiece model on at most ten million paragraphs
[ -f "$OUT/sentencepiece.bpe.model" ] ||
    run python -m fairseq_implicit train-tokenizer "$OUT/corpus/train.txt" --out "$OUT/sentencepiece.bpe.model" \
        --dictionary-size "$DICTIONARY"

# 2. raw text -> memory-mapped tokens, dict.txt and a copy of the model, in one step
[ -d "$OUT/data-bin" ] || {
    rm -rf "$OUT/data-bin.partial"
    run fairseq-preprocess --user-dir "$root/fairseq_implicit" --task implicit_masked_lm --only-source \
        --srcdict "$OUT/sentencepiece.bpe.model" \
        --trainpref "$OUT/corpus/train.txt" --validpref "$OUT/corpus/valid.txt" \
        --destdir "$OUT/data-bin.partial" --workers "$(getconf _NPROCESSORS_ONLN)"
    mv "$OUT/data-bin.partial" "$OUT/data-bin"
}

# 3. pretraining
mkdir -p "$OUT/checkpoints"
cp "$OUT/data-bin/dict.txt" "$OUT/data-bin/sentencepiece.bpe.model" "$OUT/checkpoints/"
run fairseq-train "$OUT/data-bin" --user-dir "$root/fairseq_implicit" \
    --task implicit_masked_lm --criterion implicit_masked_lm --arch "$ARCH" \
    --sample-break-mode complete --tokens-per-sample "$TOKENS_PER_SAMPLE" \
    --mask-prob 0.15 --leave-unmasked-prob 0.1 --random-token-prob 0.1 \
    --dropout 0.1 --attention-dropout 0.1 --weight-decay 0.01 --clip-norm 0.0 \
    --optimizer adam --adam-betas '(0.9,0.98)' --adam-eps 1e-6 \
    --lr "$PEAK_LR" --lr-scheduler polynomial_decay \
    --warmup-updates "$WARMUP_UPDATES" --total-num-update "$TOTAL_UPDATES" --max-update "$TOTAL_UPDATES" \
    --batch-size "$BATCH" --update-freq "$UPDATE_FREQ" ${PRECISION:+"$PRECISION"} \
    --distributed-world-size "$GPUS" --ddp-backend legacy_ddp \
    --save-dir "$OUT/checkpoints" --save-interval-updates 1000 --keep-interval-updates 2 --no-epoch-checkpoints \
    --save-on-signal --validate-interval-updates 1000 --tensorboard-logdir "$OUT/tensorboard" \
    --log-format simple --log-interval 100 --seed 1 "$@"
what_now "$OUT"
