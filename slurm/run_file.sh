# shellcheck shell=bash
# Sourced by job.sh, submit.sh and launch/bench.sh: what they need to know of a run file, without starting Python.

places_of() { # RUN_FILE: prints VLMDIST_MODEL, VLMDIST_DATA and VLMDIST_OUT as section.field=value, one a line
    local split
    [[ -z ${VLMDIST_MODEL:-} ]] || echo "model.name_or_path=$VLMDIST_MODEL"
    if [[ -n ${VLMDIST_DATA:-} ]]; then
        for split in train validation test; do # those that the run file names
            ! grep -q "^  $split: *[^ ]" "$1" || echo "data.$split=$VLMDIST_DATA/$split"
        done
    fi
    [[ -z ${VLMDIST_OUT:-} ]] || echo "output_dir=$VLMDIST_OUT"
}

value_of() { # RUN_FILE INDENT FIELD NAME section.field=value...: prints FIELD, the last NAME=VALUE of the words winning
    local value word
    value="$(sed -n "s/^$2$3: *//p" "$1" 2>/dev/null | sed "s/ *#.*//; s/^\([\"']\)\(.*\)\1\$/\2/; q")"
    for word in "${@:5}"; do
        [[ $word != "$4="* ]] || value="${word#*=}"
    done
    echo "${value/#\~/$HOME}"
}

run_folder() { # ARGUMENTS of vlmdist train or evaluate: prints output_dir
    local word file=''
    for word in "$@"; do
        [[ $word == *=* || $word == -* || -n $file ]] || file="$word"
    done
    [[ ! -d $file ]] || file="$file/run.yaml"
    value_of "$file" '' output_dir output_dir "$@"
}

last_step() { # RUN_FOLDER: prints the last step in its log, 0 before the first
    local step
    step="$(tail -c 1000000 "$1/steps.jsonl" 2>/dev/null | grep -o '"step": *[0-9]*' | tail -n 1)"
    step="${step##*[!0-9]}"
    echo "${step:-0}"
}
