#!/usr/bin/env bash
# From a bare checkout to a trained model that fills masks, in one command:
#   environment, corpus, tokenizer, binarised data, pretraining, validation, filled masks, loss curves.
# Every stage that is already done with the same inputs is kept; an interrupted training is resumed.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"

usage() {
    cat <<'HELP'
usage: bash scripts/quickstart.sh [options]

  --text PATH       pretrain on your own text: a file, or a folder of .txt, .md, .tokens, .raw files
                    (default: the documentation strings of Python's standard library and of torch)
  --model FAMILY    ode, neural-ode or deq (default: ode)
  --arch NAME       a preset of that family (default: its tiny one, ode_bert_euler_tiny)
  --updates N       training updates (default: what two cores do in three minutes); with --continue, that many more
  --dictionary-size N
                    symbols in the dictionary (default: 2048; --dictionary is the same)
  --character-coverage SHARE
                    share of the text's characters that get pieces of their own (default: 0.9995)
  --continue        go on training a finished model
  --redo            throw the trained model of this --arch away and train again
  --out DIR         where everything is written (default: quickstart)
  --help            this text
HELP
}

refuse() { # one sentence, exit status 2
    echo "quickstart: $* (bash scripts/quickstart.sh --help lists the options)" >&2
    exit 2
}

text='' coverage='' family=ode arch='' updates='' dictionary=2048 further='' redo='' out=quickstart
given=() # the options, for the commands that the end prints
while [ $# -gt 0 ]; do
    case $1 in
        --text | --model | --arch | --updates | --dictionary-size | --dictionary | --character-coverage | --out)
            [ $# -gt 1 ] && [ -n "$2" ] || refuse "$1 needs a value"
            case $1 in
                --text) text=$2 ;;
                --out) out=$2 ;;
                --model) family=$2 given+=("$1" "$2") ;;
                --arch) arch=$2 given+=("$1" "$2") ;;
                --updates) updates=$2 given+=("$1" "$2") ;;
                --character-coverage) coverage=$2 given+=("$1" "$2") ;;
                *) dictionary=$2 given+=(--dictionary-size "$2") ;;
            esac
            shift 2
            ;;
        --continue) further=yes; shift ;;
        --redo) redo=yes; shift ;;
        --help | -h) usage; exit 0 ;;
        *) refuse "unknown option $1" ;;
    esac
done
case $family in
    ode) default_arch=ode_bert_euler_tiny ;;
    neural-ode) default_arch=neural_ode_bert_tiny ;;
    deq) default_arch=deq_bert_tiny ;;
    *) refuse "unknown --model $family: choose ode, neural-ode or deq" ;;
esac
prefix=${default_arch%%_bert*}_bert
arch=${arch:-$default_arch}
case $arch in "$prefix" | "$prefix"_*) ;; *) refuse "--arch $arch is no preset of --model $family ($prefix...)" ;; esac
case $updates in *[!0-9]* | 0*) refuse "--updates $updates is not a positive whole number" ;; esac
case $dictionary in '' | *[!0-9]* | 0*) refuse "--dictionary-size $dictionary is not a positive whole number" ;; esac
[ -z "$further" ] || [ -z "$redo" ] || refuse "--continue and --redo contradict each other"
[ -z "$text" ] || [ -e "$text" ] || refuse "--text $text does not exist"
if [ -n "$text" ]; then text=$(absolute "$text") given+=(--text "$text"); fi
claim "$out"
out=$(absolute "$out")
cd "$(dirname "$0")/.."
# The same command, from anywhere; without --redo, which would throw away what it has to go on from.
again() { command_line bash "$PWD/scripts/quickstart.sh" --out "$out" "${given[@]}" "$@"; }
resume=$(again ${further:+--continue})

SECONDS=0
timings=''
note_time() { timings+=$(printf '\n  %-20s %5d s' "$1" "$2"); }
key() { cat "$@" | cksum | tr ' ' -; } # of files, or of standard input

# stage NAME RESULT KEY COMMAND...: runs COMMAND, which makes RESULT, unless an earlier run made it with the same KEY.
stage() {
    local name=$1 result=$2 wanted=$3 start=$SECONDS marker=$out/stages/$1
    shift 3
    if [ -e "$result" ] && [ "$(cat "$marker" 2>/dev/null)" = "$wanted" ]; then
        echo "== $name: kept from an earlier run ($result)"
        return
    fi
    echo "== $name"
    rm -f "$marker"
    "$@"
    mkdir -p "$out/stages"
    echo "$wanted" >"$marker"
    echo "   $((SECONDS - start)) s"
    note_time "$name" $((SECONDS - start))
}

# logged LOG PATTERN COMMAND...: what COMMAND prints goes to the end of LOG, and its lines with PATTERN to whoever watches.
logged() {
    local log=$1 pattern=$2 status=0
    shift 2
    exec 6> >(
        exec 8>&- # the folder's lock is for those who write into it
        tee -a "$log" | { grep --line-buffered -E "$pattern" || true; } |
            sed -u -E 's/^([^|]*\| INFO \| [a-z_.]+ \| |INFO:[a-z_.]+:)/   /'
    )
    filter=$!
    run "$@" >&6 6>&- || status=$?
    finish_log
    return $status
}
finish_log() { # to the last line
    exec 6>&-
    wait "$filter" || true
}
filter=''
stopped() { if [ -n "$filter" ]; then finish_log; fi; }

echo "== environment"
source scripts/environment.sh
note_time environment $SECONDS

# fairseq and hydra warn about their own internals on every start.
export PYTHONWARNINGS=ignore
if [ "$arch" != "$default_arch" ]; then
    presets=$(python -c 'import sys, difflib, fairseq_implicit.models
from fairseq.models import ARCH_MODEL_REGISTRY
print(*difflib.get_close_matches(sys.argv[1], ARCH_MODEL_REGISTRY, 4), sep=", ")' "$arch" 2>/dev/null) ||
        fail "quickstart: $venv/bin/python -c 'import fairseq_implicit.models' fails in $root: run it there to see why"
    case "$presets, " in "$arch, "*) ;; *) refuse "--arch $arch is not registered; the nearest names: $presets" ;; esac
fi
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))} # more threads only wait in a model this small

# --- the plugin, as fairseq's commands want it named
plugin=(--user-dir "$root/fairseq_implicit" --task implicit_masked_lm)

# --- corpus
if [ -n "$text" ]; then
    name=own-text
    # names, sizes and dates stand for the contents of what may be gigabytes
    corpus_key=$({ cat fairseq_implicit/corpora/small_corpus.py; ls -lLR "$text"; } | key)
    source=("$text")
else
    name=embedded
    corpus_key=$(key fairseq_implicit/corpora/{docstrings,small_corpus}.py "$stamp" <(python -V))
    source=(--docstrings)
fi
corpus=$out/$name/corpus tokenizer=$out/$name/sentencepiece.bpe.model data=$out/$name/data-bin
stage "$name-corpus" "$corpus" "$corpus_key" run python -m fairseq_implicit text-corpus "${source[@]}" --out "$corpus"

# --- tokenizer
tokenizer_key=$(key fairseq_implicit/commands/train_tokenizer.py fairseq_implicit/corpora/tokenizer_training.py <(echo "$corpus_key $dictionary $coverage"))
stage "$name-tokenizer" "$tokenizer" "$tokenizer_key" \
    run python -m fairseq_implicit train-tokenizer "$corpus/train.txt" --out "$tokenizer" --dictionary-size "$dictionary" \
    ${coverage:+--character-coverage "$coverage"}

# --- binarise: raw text in, fairseq's memory-mapped token files out
binarise() {
    local log=$data.log splits=(--trainpref "$corpus/train.txt" --validpref "$corpus/valid.txt")
    if [ -s "$corpus/test.txt" ]; then splits+=(--testpref "$corpus/test.txt"); fi
    rm -rf "$data" "$data.partial"
    # shellcheck disable=SC2016
    logged "$log" 'sents|tokens so far' bash -c 'exec "$@" 2>&1' - \
        fairseq-preprocess "${plugin[@]}" --only-source --srcdict "$tokenizer" "${splits[@]}" \
        --destdir "$data.partial" --workers "$cores" || {
        tail -n 5 "$log" >&2
        fail "quickstart: fairseq-preprocess failed; the whole log is $log"
    }
    mv "$data.partial" "$data"
}
data_key=$(key fairseq_implicit/data/dictionary.py fairseq_implicit/text/*.py <(echo "$tokenizer_key"))
stage "$name-data" "$data" "$data_key" binarise

# --- pretraining: RoBERTa's recipe at the size of two cores and three minutes. Every number is here.
# A masked-language model rests near the unigram entropy until its attention has found the neighbours: heads that start
# there spare it that. Short blocks, twice the usual share of masks and no dropout let it learn much from few tokens; large
# first weights and large updates are for the tiny models alone.
settings=(--tokens-per-sample 32 --batch-size 48 --warmup-updates 100
    --encoder-attention-heads 4 --encoder-init identity --encoder-init-std 0.1)
case $arch in
    ode_bert_euler_tiny) settings+=(--ode-time 2 --lr 4e-3) length=1900 ;;
    neural_ode_bert_tiny)
        settings+=(--ode-depth-weights linear --ode-scheme rk2 --ode-steps 2 --ode-tolerance 0 --lr 4e-3) length=1100
        ;;
    deq_bert_tiny) settings+=(--deq-warmup-steps 2 --deq-gradient jfb --deq-max-iter 6 --lr 3e-3) length=1200 ;;
    *) settings=(--tokens-per-sample 64 --batch-size 16 --lr 1e-3 --warmup-updates 300) length=3000 ;;
esac
updates=${updates:-$length}
schedule=() # what depends on the length and so may change when a training goes on
if [ "$arch" = deq_bert_tiny ]; then schedule=(--deq-warmup-updates $((updates * 3 / 4))); fi
model=$out/$name/$arch
training=(
    --arch "$arch" --criterion implicit_masked_lm --encoder-position-start neighbours "${settings[@]}"
    --dropout 0 --attention-dropout 0 --mask-prob 0.3 --valid-mask-prob 0.15
    --optimizer fused_adam --adam-betas '(0.9,0.98)' --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0
    --lr-scheduler polynomial_decay
    --seed 1 --distributed-world-size 1
)
bookkeeping=(
    --save-dir "$model" --tensorboard-logdir "$model/tensorboard"
    --save-interval-updates 500 --keep-interval-updates 1 --no-epoch-checkpoints
    --save-on-signal --max-valid-steps 80 --log-interval 100 --num-workers 1
)
training_key=$(echo "$data_key ${training[*]}" | key)
if [ -n "$redo" ]; then rm -rf "$model"; fi
if [ "$(cat "$model/inputs" 2>/dev/null || echo "$training_key")" != "$training_key" ]; then
    fail "quickstart: $model was trained on other data or with other settings: train again with --redo, or choose another --out"
fi
trained=$(cat "$model/trained" 2>/dev/null || echo 0)
target=$updates
if [ -n "$further" ]; then target=$((trained + updates)); fi

pretrain() {
    mkdir -p "$model"
    echo "$training_key" >"$model/inputs"
    # the folder is then all that the hub needs
    cp "$tokenizer" "$data/dict.txt" "$model/" || fail "quickstart: $model cannot be written; make room and go on: $resume"
    # The bar goes to the terminal; the log goes to a file and its milestones to whoever watches.
    local format=simple status=0
    if [ -t 2 ]; then format=tqdm; fi
    PYTHONUNBUFFERED=1 logged "$model/train.log" 'loss=|valid on|[0-9] blocks|num\. (shared )?model params|Loaded checkpoint' \
        fairseq-train "$data" "${plugin[@]}" "${training[@]}" "${bookkeeping[@]}" "${schedule[@]}" \
        --max-update "$target" --total-num-update "$target" --log-format "$format" || status=$?
    [ $status -eq 0 ] || fail "quickstart: fairseq-train ended with exit status $status before update $target (the reason" \
        "stands above, its log is $model/train.log); from the last checkpoint goes on: $resume"
}

if [ "$trained" -ge "$target" ]; then
    echo "== pretraining: kept, $arch has $trained updates (--continue goes on, --redo starts again)"
elif [ "$trained" -gt 0 ] && [ -z "$further" ]; then
    fail "quickstart: $model has $trained finished updates: go on with --continue --updates $((updates - trained)), or train again with --redo"
else
    echo "== pretraining $arch: $target updates on $cores cores"
    start=$SECONDS
    pretrain
    echo "$target" >"$model/trained"
    echo "   $((SECONDS - start)) s"
    note_time pretraining $((SECONDS - start))
fi

# shown NAME COMMAND...: a stage whose point is what it prints
shown() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@"
    echo "   $((SECONDS - start)) s"
    note_time "$name" $((SECONDS - start))
}
checkpoint=$model/checkpoint_best.pt
sentences=(
    "Return the <mask> of the list."
    "If the file does not <mask>, an error is raised."
    "Returns a new <mask> with the same shape as the input."
    "The <mask> value is None."
)
if [ -n "$text" ]; then sentences=(); fi # it may be in any language
sweep=(depth-sweep "$checkpoint" "$data" --out "$model/dial.png") quick=()
case $family in
    ode) quick=(--schemes euler,rk2 --pairs '') ;; # adaptive solvers refine what one step has not been trained for
    deq) sweep[0]=budget-sweep ;;
esac
shown "validation" run python -m fairseq_implicit score "$checkpoint" "$data"
shown "filled masks" run python -m fairseq_implicit fill-masks "$model" "${sentences[@]}" --text "$corpus/valid.txt"
shown "loss curves" run python -m fairseq_implicit plot-losses "$model/tensorboard" --out "$model/losses.png" --data "$data" --title "$arch"
shown "dial of depth" run python -m fairseq_implicit "${sweep[@]}" "${quick[@]}"

cat <<SUMMARY

time per stage:$timings
  all                  $(printf '%5d' $SECONDS) s

model    $checkpoint
curves   $model/losses.png
dial     $model/dial.png
try      $(from_anywhere fill-masks "$model") "Return the <mask> of the list."
sweep    $(from_anywhere "${sweep[@]}" --all)
more     $(again --continue)
tune     $(command_line bash "$root/examples/glue/finetune.sh" GLUE/RTE RTE "$model" "$model/rte")
SUMMARY
