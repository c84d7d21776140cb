#!/usr/bin/env bash
# Throughput of a run file on this machine with several numbers of ranks, one after the other, and side by side.
#
#   bash launch/bench.sh RUN.yaml [RANKS ...] [options of vlmdist bench] [section.field=value ...]
#   bash launch/bench.sh launch/runs/demo.yaml 1 2 4 --steps 10
#
# Without RANKS: 1, 2, 4, ... up to one a GPU (two on a CPU; VLMDIST_RANKS). In the run folder's bench/: a folder for each,
# and sweep.md, .json and .png. A run file with train.global_batch_size shows strong scaling (the same batch on more ranks),
# one with train.gradient_accumulation_steps weak scaling.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=slurm/run_file.sh
source "$VLMDIST_HOME/slurm/run_file.sh"

[[ $# -ge 1 ]] || die "usage: bash launch/bench.sh RUN.yaml [RANKS ...] [--steps N] [section.field=value ...]"
run_file="$1"
shift
counts=()
while [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; do
    counts+=("$1")
    shift
done
for word in "$@"; do
    [[ $word != --json* && $word != --name* ]] || die "$word: the sweep chooses that itself, one a number of ranks"
done
choose_python
if ((${#counts[@]} == 0)); then
    most="$(num_ranks)" || exit
    for ((n = 1; n < most; n *= 2)); do counts+=("$n"); done
    counts+=("$most")
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

folder="$(run_folder "$run_file" "$@")/bench"
results=()
for n in "${counts[@]}"; do
    printf '== %s\n' "$n rank$( ((n == 1)) || echo s)"
    "$PYTHON" "$VLMDIST_HOME/launch/start_ranks.py" torchrun --standalone --nproc-per-node "$n" \
        -m vlmdist bench "$run_file" "$@"
    results+=("$folder/$(printf 'ranks-%04d' "$n")/bench.json")
done
printf '== side by side: %s\n' "$folder/sweep.md, .json, .png"
"$PYTHON" -m vlmdist bench "${results[@]}" --json "$folder/sweep.json" --png "$folder/sweep.png" >"$folder/sweep.md"
cat "$folder/sweep.md"
