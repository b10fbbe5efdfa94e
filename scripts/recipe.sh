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

what_now() { # FOLDER: what can be done with the checkpoints in FOLDER/checkpoints
    local python=$root/.venv/bin/python best=$1/checkpoints/checkpoint_best.pt
    [ -f "$best" ] || return 0
    echo
    echo "model    $best"
    echo "try      $(command_line "$python" "$root/scripts/fill_masks.py" "$1/checkpoints")" '"A sentence with one <mask>."'
    echo "curves   $(command_line "$python" "$root/scripts/plot_losses.py" "$1/tensorboard" --out "$1/losses.png")"
    echo "tune     $(command_line bash "$root/examples/glue/finetune.sh" GLUE/RTE RTE "$1/checkpoints" "$1/rte")"
}

# --- one owner of a folder

# claim FOLDER: makes FOLDER, and makes it this script's own until the script and all that it started have ended. The
# owner stands in FOLDER/.lock; where there is flock the kernel knows whether it is alive, elsewhere its number tells.
claim() {
    local lock=$1/.lock pid host since status=2
    mkdir -p -- "$1"
    if command -v flock >/dev/null; then
        exec 8>>"$lock"
        status=0
        flock -n 8 2>/dev/null || status=$? # 1: held by another; other numbers: a file system without locks
    fi
    read -r pid host since 2>/dev/null <"$lock" || true
    if [ $status -gt 1 ] && [ -n "${pid:-}" ]; then
        status=1
        if [ "$host" = "$(uname -n)" ] && ! kill -0 "$pid" 2>/dev/null; then status=0; fi
    fi
    if [ $status -eq 1 ]; then
        exec 8>&-
        if [ "$host" = "$(uname -n)" ] && ! kill -0 "$pid" 2>/dev/null; then # killed, but not what it had started
            pid=$(find -L /proc/[0-9]*/fd -maxdepth 1 -samefile "$lock" 2>/dev/null | cut -d / -f 3 | sort -un | tr "\n" " ") || true
        fi
        fail "$recipe: $1 is in use by process $pid on $host since $since: wait for it, stop it, or choose another folder"
    fi
    echo "$$ $(uname -n) $(date '+%Y-%m-%d %H:%M:%S')" >"$lock"
    claimed=$(absolute "$1")/.lock
    trap ': >"$claimed"' EXIT
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
