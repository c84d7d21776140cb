#!/usr/bin/env bash
# The gate, for hand, hook and CI: style, types, imports between layers, shell scripts, tests. Arguments go to pytest.
#
#   bash launch/check.sh                 everything
#   bash launch/check.sh tests/data -x   the gate with these tests alone
set -uo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$VLMDIST_HOME" || exit
[[ -x $vlmdist_venv/bin/ruff ]] || die "the tools of the gate are not installed in $vlmdist_venv: run bash launch/test.sh"
bin="$vlmdist_venv/bin"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

failed=()
check() { # NAME COMMAND...: quiet when all is well
    local name="$1" output started=$SECONDS
    shift
    if output="$("$@" 2>&1)"; then
        printf '== %-22s ok  %3d s\n' "$name" $((SECONDS - started))
    else
        failed+=("$name")
        printf '== %-22s FAILED\n%s\n' "$name" "$output"
    fi
}

mapfile -d '' scripts < <(find launch slurm .ci tests -type f \( -name '*.sh' -o -path '.ci/run' \) -print0 | sort -z)
check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check .
check "mypy vlmdist" "$bin/mypy" vlmdist
check "mypy shards" "$bin/mypy" shards
check "mypy launch" "$bin/mypy" launch
check "imports of the layers" "$bin/lint-imports" --no-cache
check "shellcheck" "$bin/shellcheck" --external-sources "${scripts[@]}"

if ((${#failed[@]})); then
    printf 'error: %s failed (above); tests follow\n' "$(IFS=,; echo "${failed[*]}")" >&2
fi
"$bin/python" -m pytest "$@"
tests=$?
((${#failed[@]} == 0)) || exit 1
exit "$tests"
