#!/usr/bin/env bash
# The whole chain on this machine, from made-up receipts to a table of scores before and after training. Needs Python 3.11
# and a network for pip alone; uses the GPUs it finds, else two processes on the CPU.
#
#   bash launch/demo.sh                      receipt lines to normalised items (text)
#   bash launch/demo.sh --images             receipt images to company, date, address, total
#   bash launch/demo.sh --all                both
#   bash launch/demo.sh --fresh              in a new run folder; else what an earlier start has finished is not done again
#   bash launch/demo.sh train.max_steps=20   section.field=value of launch/runs/demo.yaml; output_dir=DIR is the run folder
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$VLMDIST_HOME"

parts=(lines) fresh='' overrides=() output_dir=''
for argument in "$@"; do
    case "$argument" in
    --images) parts=(images) ;;
    --all) parts=(lines images) ;;
    --fresh) fresh=1 ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    output_dir=?*) output_dir="${argument#*=}" ;;
    -*) die "unknown option $argument; there are --images, --all, --fresh" ;;
    *.*=*) overrides+=("$argument") ;;
    *) die "unknown argument $argument; an override is section.field=value" ;;
    esac
done
[[ -z $output_dir || ${#parts[@]} == 1 ]] || die "output_dir is one run folder; leave it out with --all, which makes two"

declare -A run_file=([lines]=launch/runs/demo.yaml [images]=launch/runs/demo_images.yaml)
declare -A run_name=([lines]=demo [images]=demo-images)
declare -A samples=([lines]='--train 2000 --validation 60 --test 120' [images]='--train 400 --validation 40 --test 60')
declare -A model=([lines]=smollm2 [images]=smolvlm)

main() {
    local part
    stage set-up set_up
    for part in "${parts[@]}"; do
        run_part "$part"
    done
}

run_part() { # lines or images
    local part="$1"
    local run args
    run="$(run_folder "${output_dir:-runs/${run_name[$part]}}")"
    args=("${run_file[$part]}" "output_dir=$run" "${overrides[@]}")
    mkdir -p "$run"
    seconds_file="$run/demo_seconds.tsv"
    stage model "$vlmdist_venv/bin/python" launch/fetch_models.py "${model[$part]}"
    stage shards make_shards "$part"
    stage "evaluate base" bash launch/evaluate.sh "${args[@]}" --base
    stage train bash launch/train.sh "${args[@]}"
    stage "evaluate trained" bash launch/evaluate.sh "${args[@]}" --name trained
    stage report "$vlmdist_venv/bin/python" -m vlmdist report "$run"
    echo
    "$vlmdist_venv/bin/python" launch/demo_table.py "$run"
}

run_folder() { # BASE: BASE, BASE-2, ...: the newest there is, or with --fresh the first that is not there
    local base="$1" folder="$1" next=2
    while [[ -e $base-$next ]]; do
        folder="$base-$next"
        ((next++))
    done
    if [[ -n $fresh && -e $folder ]]; then
        folder="$base-$next"
    fi
    echo "$folder"
}

make_shards() { # lines or images
    local folder="runs/demo-data/$1"
    if [[ -f $folder.done ]]; then
        echo "$folder is there"
        return
    fi
    # shellcheck disable=SC2086 # several options in one word
    "$vlmdist_venv/bin/python" shards/synthetic_receipts.py --kind "$1" --out "$folder" --overwrite ${samples[$1]} || return
    touch "$folder.done"
}

seconds_file='' seconds_left='' # what was timed before there was a run folder
stage() { # NAME COMMAND...: with its seconds, which demo_table.py adds up. `set -e` does not hold inside COMMAND.
    local name="$1" code=0 started milliseconds
    started=$(date +%s%3N)
    shift
    printf '\n== %s\n' "$name"
    "$@" || code=$?
    if ((code != 0)); then
        printf 'error: the demo stopped at the stage "%s" (exit code %d, message above); run it again to go on from there\n' \
            "$name" "$code" >&2
        exit "$code"
    fi
    milliseconds=$(($(date +%s%3N) - started))
    seconds_left+="$(printf '%s\t%s\t%d.%03d' "$$" "$name" $((milliseconds / 1000)) $((milliseconds % 1000)))"$'\n'
    if [[ -n $seconds_file ]]; then
        printf '%s' "$seconds_left" >>"$seconds_file"
        seconds_left=''
    fi
}

main
