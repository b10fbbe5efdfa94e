# Makes the project's environment, or reuses it: `.venv` in the checkout, with the versions of requirements.txt.
# quickstart.sh, test.sh and check.sh source this file; `bash scripts/environment.sh` runs it alone.
#
# PYTHON   interpreter for a new environment (Python 3.11 or 3.12; by default the first of these on the PATH)

root=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
wheels=$root/.wheels
logs=$venv/set-up-logs
stamp=$venv/set-up-complete
requirements=$root/requirements.txt
source "$root/scripts/recipe.sh"

# watched LABEL LOG COMMAND...: runs COMMAND with its output in LOG and shows that it is alive: the seconds and the
# last line of the log on a terminal, a line every 30 seconds elsewhere.
watched() {
    local label=$1 log=$2 status=0 start=$SECONDS beat
    shift 2
    : >"$log"
    echo "  $label ..."
    (
        while sleep 1 && kill -0 $$ 2>/dev/null; do
            if [ -t 1 ]; then
                printf '\r\033[K  %4d s  %.90s' $((SECONDS - start)) "$(tail -n 1 "$log" | tr -cd '[:print:]')"
            elif [ $(((SECONDS - start) % 30)) -eq 0 ]; then
                echo "  $label: still at work after $((SECONDS - start)) s"
            fi
        done
    ) 8>&- 9>&- &
    beat=$!
    "$@" >>"$log" 2>&1 || status=$?
    kill "$beat" 2>/dev/null || true
    wait "$beat" 2>/dev/null || true # it reports the signal that ended it
    if [ -t 1 ]; then printf '\r\033[K'; fi
    if [ "$status" -ne 0 ]; then
        tail -n 15 "$log" >&2
        fail "environment: $label failed (exit status $status); the whole log is $log"
    fi
    echo "  $label: $((SECONDS - start)) s"
}

supported_python() { # whether the interpreter $1 runs and is one of the supported versions
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        supported_python "$PYTHON" || fail "environment: PYTHON=$PYTHON is not a working Python 3.11 or 3.12"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3 python python3.12; do
        if supported_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "environment: no Python 3.11 or 3.12 on the PATH: install one or name it with PYTHON=/path/to/python"
}

section() { # the requirements between the heading "--- $1:" and the next heading
    awk -v name="# --- $1:" '/^# ---/ { inside = index($0, name) == 1; next } inside && NF && !/^#/' "$requirements"
}

pip_install() { # pip with the pins as constraints, so that nothing it pulls in can replace torch
    run "$venv/bin/python" -m pip install --disable-pip-version-check --no-build-isolation --constraint "$requirements" "$@"
}

make_venv() {
    local python=$1
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        run "$python" -m venv --clear "$venv"
    else # Python packages of some distributions leave ensurepip out
        run "$python" -m venv --clear --without-pip "$venv" && run "$python" -m pip --python "$venv/bin/python" install pip
    fi
}

# build_fairseq REQUIREMENT: compiles the wheel into .wheels once. Without optimisation the torch extensions, which text
# models never call, take half the time; the Cython loops that matter set their own -O3.
build_fairseq() {
    rm -rf "$wheels/partial"
    run env -u CUDA_HOME CFLAGS="-O0 -g0" CXXFLAGS="-O0 -g0" "$venv/bin/python" -m pip wheel \
        --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir "$wheels/partial" "$1" &&
        mv "$wheels/partial"/*.whl "$wheels"/ && rmdir "$wheels/partial"
}

check_compiler() {
    "$venv/bin/python" - <<'PYTHON' || fail "environment: Python.h is missing: install the development files of $("$venv/bin/python" -V)"
import os, sysconfig
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
PYTHON
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
        fail "environment: fairseq must be compiled and there is no C++ compiler on the PATH: install g++ or clang"
}

fairseq_wheel() { # the path of a built wheel of requirement $1 for this interpreter, or nothing
    local version=${1#*==} tag
    tag=$("$venv/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    ls "$wheels"/fairseq_fixed-"$version"-"$tag"-*.whl 2>/dev/null | head -n 1
}

set_up() {
    local wanted python foundation fairseq packages tools undeclared
    wanted="$(cksum <"$requirements")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && supported_python "$venv/bin/python"; then
        echo "environment: $venv is ready"
        return
    fi
    foundation=$(section foundation) fairseq=$(section fairseq) packages=$(section packages)
    tools=$(section tools) undeclared=$(section undeclared)
    if ! supported_python "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || exit 1
        echo "environment: making $venv with $("$python" -V) ($python)"
        mkdir -p "$wheels"
        watched "virtual environment" "$wheels/venv.log" make_venv "$python"
    else
        echo "environment: completing $venv"
    fi
    mkdir -p "$logs"
    # The words of each section are separate arguments on purpose.
    # shellcheck disable=SC2086
    {
        watched "torch and what compiling needs" "$logs/foundation.log" pip_install $foundation
        if [ -z "$(fairseq_wheel $fairseq)" ]; then
            check_compiler
            watched "compiling fairseq, once (about two minutes on two cores)" "$logs/fairseq-build.log" \
                build_fairseq $fairseq
        fi
        watched "fairseq" "$logs/fairseq.log" pip_install --no-deps "$(fairseq_wheel $fairseq)"
        watched "packages" "$logs/packages.log" pip_install $packages
        watched "linter and type checker" "$logs/tools.log" pip_install $tools
        watched "ODE and equilibrium packages" "$logs/undeclared.log" pip_install --no-deps $undeclared
    }
    watched "trying fairseq and torch" "$logs/trial.log" run "$venv/bin/python" -c \
        'import torch, fairseq, fairseq.data.token_block_utils_fast, sentencepiece; print(torch.__version__)'
    echo "$wanted" >"$stamp"
}

# One set-up at a time in a checkout: two commands started together would write into the same environment.
if command -v flock >/dev/null; then
    mkdir -p "$wheels"
    exec 9>"$wheels/lock"
    flock -n 9 || { echo "environment: waiting for another set-up of this checkout to end"; flock 9; }
    set_up
    exec 9>&-
else
    set_up
fi
export PATH="$venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
unset PYTHONHOME
# What fairseq_implicit/open_mp.py does for commands of the package, for fairseq's as well.
if [ -z "${GOMP_SPINCOUNT:-}${OMP_WAIT_POLICY:-}" ]; then export GOMP_SPINCOUNT=10000; fi
