# Sourced by the quickstart and the recipes, before anything else: absolute paths, one owner of a folder, and signals
# that reach what the script has started. bash looks at signals only between its commands; a recipe that is stopped would
# leave the training behind, and a second one would go into the same folder.

unset CDPATH # with it `cd` prints where it went
recipe=$(basename -- "$0" .sh)
exec 7>&2 # standard error, also where a redirection is at work

note() { echo "$*" >&7 || true; } # the terminal may be gone

fail() { # one sentence, exit status 1
    note "$@"
    exit 1
}

absolute() { # the absolute path of an existing file or folder $1
    local path=$1
    case $path in /*) ;; *) path=./$path ;; esac
    [ -e "$path" ] || fail "$recipe: $1: no such file or folder"
    if [ -d "$path" ]; then (cd "$path" && pwd); else (cd "$(dirname "$path")" && echo "$(pwd)/$(basename "$path")"); fi
}

command_line() { # the words of a command as they can be pasted into a shell
    printf '%q ' "$@" | sed 's/ $//'
    echo
}

from_anywhere() { # a command of this package as it can be pasted into a shell, whatever the folder
    command_line env "PYTHONPATH=$root" "$root/.venv/bin/python" -m fairseq_implicit "$@"
}

what_now() { # FOLDER: what can be done with the checkpoints in FOLDER/checkpoints
    local best=$1/checkpoints/checkpoint_best.pt
    [ -f "$best" ] || return 0
    echo
    echo "model    $best"
    echo "try      $(from_anywhere fill-masks "$1/checkpoints")" '"A sentence with one <mask>."'
    echo "curves   $(from_anywhere plot-losses "$1/tensorboard" --out "$1/losses.png")"
    echo "tune     $(command_line bash "$root/examples/glue/finetune.sh" GLUE/RTE RTE "$1/checkpoints" "$1/rte")"
}

# --- one owner of a folder

alive() { kill -0 "$1" 2>/dev/null || ps -p "$1" >/dev/null 2>&1; } # `kill` may not touch another user's process

# claim FOLDER: makes FOLDER, and makes it this script's own until the script and all that it started have ended. The
# owner stands in FOLDER/.lock; where there is flock the kernel knows whether it is alive, elsewhere its number tells.
claim() {
    local lock=$1/.lock pid='' host='' since='' ended='' status=2
    mkdir -p -- "$1"
    if command -v flock >/dev/null; then
        exec 8>>"$lock"
        status=0
        flock -n 8 2>/dev/null || status=$? # 1: held by another; other numbers: a file system without locks
    fi
    { read -r pid host since <"$lock"; } 2>/dev/null || true
    if [ -z "$pid" ] || { [ "$host" = "$(uname -n)" ] && ! alive "$pid"; }; then ended=yes; fi
    if [ $status -gt 1 ]; then
        if [ -n "$ended" ]; then status=0; fi
    elif [ $status -eq 1 ] && [ -n "$ended" ]; then # what that script had started is about to end, or goes on without it
        sleep 1
        if flock -n 8; then status=0; fi
    fi
    if [ $status -ne 0 ]; then
        if [ -n "$ended" ]; then
            exec 8>&-
            pid=$(find -L /proc/[0-9]*/fd -maxdepth 1 -samefile "$lock" 2>/dev/null | cut -d / -f 3 | sort -un) || true
            pid=${pid//$'\n'/, }
        fi
        fail "$recipe: $1 is in use by process ${pid:-?} on ${host:-?} since ${since:-?}: wait for it, stop it, or choose" \
            "another folder"
    fi
    echo "$$ $(uname -n) $(date '+%Y-%m-%d %H:%M:%S')" >"$lock"
    claimed=$(absolute "$1")/.lock
    trap '{ : >"$claimed"; } 2>/dev/null || true' EXIT
}

# --- signals

child=''     # the command that `run` waits for; "starting" until its number is known
suspended='' # not empty after a Ctrl-Z
session=()   # a session of its own: Ctrl-C reaches the script alone, and all processes of a command can be ended together
if command -v setsid >/dev/null; then session=(setsid); fi

# run PROGRAM...: runs it so that a signal to this script ends it. Not for functions, nor inside a pipeline.
run() {
    local status
    child=starting
    "${session[@]}" "$@" <&0 &
    child=$!
    while :; do
        suspended='' status=0
        wait "$child" || status=$?
        [ -n "$suspended" ] || break
    done
    child=''
    return $status
}

stopped() { :; } # what else a script wants done when the signal $1 has ended its command

# A signal: a training with --save-on-signal saves its checkpoint after the running update, so it is told first and
# waited for; what it leaves behind is ended with it. The exit status is 128 and the signal's number.
stop() {
    local signal=$1 sent=TERM
    trap '' HUP INT TERM USR1 TSTP # `timeout` sends two
    if [ "$signal" = USR1 ]; then sent=USR1; fi
    if [ "$child" = starting ]; then child=${!:-}; fi
    if [ -n "$child" ] && kill -s "$sent" "$child" 2>/dev/null; then
        note "$recipe: SIG$signal: waiting for the running command to end"
        while kill -0 "$child"; do wait "$child" || true; done # a second signal ends a `wait` early
        kill -s TERM -- "-$child" 2>/dev/null || true
    fi 2>/dev/null # bash reports how the child ended
    stopped "$signal" || true
    note "$recipe: stopped by SIG$signal; from there goes on: ${resume:-the same command}"
    exit $((128 + $(kill -l "$signal")))
}

suspend() { # Ctrl-Z: the command lies in another session and would go on
    suspended=yes
    if [ -n "$child" ]; then kill -s STOP -- "-$child" 2>/dev/null || true; fi
    kill -s STOP $$
    if [ -n "$child" ]; then kill -s CONT -- "-$child" 2>/dev/null || true; fi
}

for signal in HUP INT TERM USR1; do
    # shellcheck disable=SC2064
    trap "stop $signal" $signal
done
trap suspend TSTP
