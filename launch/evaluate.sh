#!/usr/bin/env bash
# Evaluate on this machine, one rank a GPU (two ranks on a CPU), started by accelerate; or on several, by
# `deepspeed --hostfile`.
#
#   bash launch/evaluate.sh RUN.yaml [--base | --checkpoint DIR] [section.field=value ...]
#   bash launch/evaluate.sh --hostfile HOSTFILE RUN.yaml ...     (see start_hosts.py)
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

[[ $# -ge 1 ]] ||
    die "usage: bash launch/evaluate.sh [--hostfile HOSTFILE] RUN.yaml [--base | --checkpoint DIR] [section.field=value ...]"
choose_python
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[[ $1 != --hostfile ]] || start_on_hosts evaluate "${@:2}"
ranks="$(num_ranks)" || exit
# a config file of our own and every choice as a flag: `accelerate config` of the user's has no say
how=(--config_file "$VLMDIST_HOME/launch/accelerate.yaml" --num_processes "$ranks" --num_machines 1
    --mixed_precision no --dynamo_backend no --main_process_port 0)
if ((ranks > 1)); then
    how+=(--multi_gpu) # accelerate's word for one process a rank, on the CPU too
fi
exec "$PYTHON" "$VLMDIST_HOME/launch/start_ranks.py" accelerate launch "${how[@]}" -m vlmdist evaluate "$@"
