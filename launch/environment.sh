# shellcheck shell=bash
# Sourced by the other scripts of launch/: where the repository is, which Python runs vlmdist, and its set-up.
#
#   VLMDIST_VENV     folder of the virtual environment (default: .venv in the repository)
#   VLMDIST_PYTHON   interpreter that makes it (default: the first of python3.13, 3.12, 3.11, python3 that is 3.11 or newer)
#
# pip's own settings hold (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf). On Linux the torch of the default index brings
# several GB of CUDA packages, GPU or not; an index with a CPU build of torch in PIP_EXTRA_INDEX_URL avoids that.

VLMDIST_HOME="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export VLMDIST_HOME
vlmdist_venv="${VLMDIST_VENV:-$VLMDIST_HOME/.venv}"
[[ $vlmdist_venv == /* ]] || vlmdist_venv="$PWD/$vlmdist_venv"

die() { # one sentence for the user, exit code 2: wrong use or wrong input
    printf 'error: %s\n' "$*" >&2
    exit 2
}

isolate_venv() { # a conda or other environment that is active, and packages in the user's home, must not shine through
    unset PYTHONHOME PYTHONPATH __PYVENV_LAUNCHER__
    export PYTHONNOUSERSITE=1
}

# --- set-up -----------------------------------------------------------------------------------------------------------

set_up() { # makes or mends the virtual environment; a second call is instant
    local stamp="$vlmdist_venv/.vlmdist-set-up" wanted
    isolate_venv
    wanted="$(sha256sum "$VLMDIST_HOME/setup.py" "$VLMDIST_HOME/launch/constraints.txt")"
    if [[ -f $stamp && "$(cat "$stamp")" == "$wanted" && -x $vlmdist_venv/bin/python ]]; then
        return
    fi
    local started=$SECONDS
    mkdir -p "$(dirname "$vlmdist_venv")" || die "$(dirname "$vlmdist_venv") can't be written: set VLMDIST_VENV to a folder of yours"
    if command -v flock >/dev/null; then # two set-ups at once would spoil each other
        exec 9>"$vlmdist_venv.lock"
        flock -n 9 || { say "another set-up of $vlmdist_venv is running; waiting for it"; flock 9; }
        if [[ -f $stamp && "$(cat "$stamp")" == "$wanted" ]]; then
            exec 9>&-
            return
        fi
    fi
    make_venv
    local log="$vlmdist_venv/set-up.log"
    : >"$log" 2>/dev/null || die "$vlmdist_venv can't be written: set VLMDIST_VENV to a folder of yours"
    rm -f "$stamp"
    # torch first: a later step must not choose another one
    say "set-up 1/3: pip and setuptools (log: $log)"
    pip_install "$log" --upgrade pip "setuptools>=68" wheel
    say "set-up 2/3: torch"
    pip_install "$log" "$(grep '^torch==' "$VLMDIST_HOME/launch/constraints.txt")"
    say "set-up 3/3: vlmdist and everything else, the versions that were tested together"
    (cd "$VLMDIST_HOME" && pip_install "$log" -c launch/constraints.txt -e '.[demo,test]') || exit
    printf '%s\n' "$wanted" >"$stamp"
    say "set-up done in $((SECONDS - started)) s"
    [[ -e /dev/fd/9 ]] && exec 9>&-
    rm -f "$vlmdist_venv.lock"
}

say() { printf '== %s\n' "$*"; }

make_venv() {
    local python="$vlmdist_venv/bin/python"
    if [[ -x $python ]] && "$python" -c '' 2>/dev/null; then
        is_new_enough "$python" ||
            die "$vlmdist_venv holds a Python older than 3.11: remove that folder, or set VLMDIST_VENV to another"
        "$python" -m pip --version >/dev/null 2>&1 && return
    elif [[ -e $vlmdist_venv && ! -f $vlmdist_venv/pyvenv.cfg && -n "$(ls -A "$vlmdist_venv" 2>/dev/null)" ]]; then
        die "$vlmdist_venv exists and is no virtual environment: remove it, or set VLMDIST_VENV to another folder"
    fi
    local base
    base="$(find_python)" || exit
    say "set-up: virtual environment in $vlmdist_venv from $base"
    local output
    # --clear: what is there is an environment whose interpreter is gone, or a half-made one
    output="$("$base" -m venv --clear "$vlmdist_venv" 2>&1)" ||
        die "$base could not make a virtual environment in $vlmdist_venv: ${output##*$'\n'}"
}

find_python() { # prints the interpreter
    local candidate path
    for candidate in ${VLMDIST_PYTHON:-python3.13 python3.12 python3.11 python3}; do
        path="$(command -v "$candidate")" || continue
        is_new_enough "$path" || continue
        if "$path" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$path"
            return
        fi
        local without_venv="$path"
    done
    if [[ -n ${without_venv:-} ]]; then
        die "$without_venv has no venv module: on Debian or Ubuntu install $(
            "$without_venv" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
        ), or set VLMDIST_PYTHON to another Python"
    fi
    if [[ -n ${VLMDIST_PYTHON:-} ]]; then
        die "VLMDIST_PYTHON=$VLMDIST_PYTHON is no Python 3.11 or newer"
    fi
    die "no Python 3.11 or newer found (looked for python3.13, python3.12, python3.11, python3): install one, or set VLMDIST_PYTHON"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

pip_install() { # LOG ARGUMENTS...
    local log="$1"
    shift
    # a target or prefix in the user's pip settings would lead out of the environment
    if ! env -u PIP_TARGET -u PIP_PREFIX -u PIP_USER "$vlmdist_venv/bin/python" -m pip install \
        --disable-pip-version-check --progress-bar off "$@" >>"$log" 2>&1; then
        printf 'error: pip install %s failed; the end of %s:\n' "$*" "$log" >&2
        tail -n 15 "$log" >&2
        exit 1
    fi
}

# --- running ----------------------------------------------------------------------------------------------------------

choose_python() { # sets PYTHON: the virtual environment's, else the active one
    # torch too: in this folder every Python finds a vlmdist
    local candidate needed='import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ["vlmdist", "torch"])))'
    [[ ! -x $vlmdist_venv/bin/python ]] || isolate_venv
    for candidate in "$vlmdist_venv/bin/python" python python3; do
        PYTHON="$(command -v "$candidate")" || continue
        "$PYTHON" -c "$needed" 2>/dev/null && return
    done
    die "vlmdist is not installed: no environment in $vlmdist_venv, and the active python has no vlmdist." \
        "Run: bash $VLMDIST_HOME/launch/demo.sh (sets everything up), or pip install -e $VLMDIST_HOME"
}

num_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        local ids="${CUDA_VISIBLE_DEVICES//[^,]/}"
        [[ -z $CUDA_VISIBLE_DEVICES || $CUDA_VISIBLE_DEVICES == -1 ]] && echo 0 || echo $((${#ids} + 1))
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true # none, or a broken driver: 0
    else
        echo 0
    fi
}

num_ranks() { # VLMDIST_RANKS, else one a GPU, else two on the CPU
    local gpus
    gpus="$(num_gpus)"
    local ranks="${VLMDIST_RANKS:-$((gpus > 0 ? gpus : 2))}"
    [[ $ranks =~ ^[1-9][0-9]*$ ]] || die "VLMDIST_RANKS=$ranks: a number of ranks is 1 or more"
    ((gpus == 0 || ranks <= gpus)) || die "VLMDIST_RANKS=$ranks is over the $gpus GPUs of this machine: one rank a GPU"
    echo "$ranks"
}

start_on_hosts() { # COMMAND of vlmdist, HOSTFILE, ARGUMENTS...: ranks on every host of the file
    [[ $# -ge 3 ]] || die "usage: bash launch/$1.sh --hostfile HOSTFILE RUN.yaml ...; a line of HOSTFILE is 'HOST slots=N'"
    exec "$PYTHON" "$VLMDIST_HOME/launch/start_hosts.py" "$2" "$1" "${@:3}"
}
