# From a prepared corpus to fairseq-train; pile.sh and oscar.sh set OUT, TRIAL and WORKERS and source this file.
# A corpus below a gigabyte gets the settings of a trial, which a CPU finishes in minutes.

if [ "$TRIAL" = yes ]; then
    ARCH=ode_bert_rk2_tiny DICTIONARY=2048 PRESET=()
    TOKENS_PER_SAMPLE=128 BATCH=16 SEQUENCES=16 TOTAL_UPDATES=300 WARMUP_UPDATES=30 PEAK_LR=0.001 INTERVAL=50
else
    ARCH=ode_bert_rk2_base DICTIONARY=32000 PRESET=(--preset bert-32k)
    TOKENS_PER_SAMPLE=512 BATCH=16 SEQUENCES=2048 TOTAL_UPDATES=125000 WARMUP_UPDATES=10000 PEAK_LR=0.0005 INTERVAL=1000
fi
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" = 0 ]; then GPUS=1; fi # a CPU
PRECISION=$(python -m fairseq_implicit precision) # --fp16 on a GPU, --bf16 on a CPU that has it, else float32
UPDATE_FREQ=$((SEQUENCES / BATCH / GPUS > 0 ? SEQUENCES / BATCH / GPUS : 1))

# sentencepiece model on a random sample of the shards, and its dict.txt
[ -f "$OUT/tokenizer/sentencepiece.bpe.model" ] ||
    run python -m fairseq_implicit train-tokenizer "$OUT/prepared" --out "$OUT/tokenizer/sentencepiece.bpe.model" \
        "${PRESET[@]}" --dictionary-size "$DICTIONARY" --sample-size 500MB

# text shards -> data-bin/shard0 ... shardN; finished shards are kept
run python -m fairseq_implicit binarise "$OUT/prepared" --tokenizer "$OUT/tokenizer/sentencepiece.bpe.model" \
    --output "$OUT/data-bin" --workers "$WORKERS" --fast

# pretraining: one shard is one epoch of fairseq, so everything counts updates
mkdir -p "$OUT/checkpoints"
cp "$OUT/data-bin/shard0/dict.txt" "$OUT/data-bin/shard0/sentencepiece.bpe.model" "$OUT/checkpoints/"
run fairseq-train "$(cat "$OUT/data-bin/data-bin.txt")" --user-dir "$root/fairseq_implicit" \
    --task implicit_masked_lm --criterion implicit_masked_lm --arch "$ARCH" \
    --sample-break-mode complete --tokens-per-sample "$TOKENS_PER_SAMPLE" \
    --mask-prob 0.15 --leave-unmasked-prob 0.1 --random-token-prob 0.1 \
    --dropout 0.1 --attention-dropout 0.1 --weight-decay 0.01 --clip-norm 0.0 \
    --optimizer adam --adam-betas '(0.9,0.98)' --adam-eps 1e-6 \
    --lr "$PEAK_LR" --lr-scheduler polynomial_decay \
    --warmup-updates "$WARMUP_UPDATES" --total-num-update "$TOTAL_UPDATES" --max-update "$TOTAL_UPDATES" \
    --batch-size "$BATCH" --update-freq "$UPDATE_FREQ" ${PRECISION:+"$PRECISION"} \
    --distributed-world-size "$GPUS" --ddp-backend legacy_ddp \
    --save-dir "$OUT/checkpoints" --save-interval-updates "$INTERVAL" --keep-interval-updates 2 \
    --no-epoch-checkpoints --save-on-signal --validate-interval-updates "$INTERVAL" --validate-interval 1000000 \
    --tensorboard-logdir "$OUT/tensorboard" --log-format simple --log-interval "$INTERVAL" --seed 1 "$@"
what_now "$OUT"
