#!/usr/bin/env bash
# Train on this machine, one rank a GPU (two ranks on a CPU), started by torchrun; or on several, by
# `deepspeed --hostfile`.
#
#   bash launch/train.sh RUN.yaml [section.field=value ...]
#   VLMDIST_RANKS=4 bash launch/train.sh launch/runs/sroie.yaml train.learning_rate=1e-4
#   bash launch/train.sh --hostfile HOSTFILE RUN.yaml [section.field=value ...]     (see start_hosts.py)
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

[[ $# -ge 1 ]] || die "usage: bash launch/train.sh [--hostfile HOSTFILE] RUN.yaml [section.field=value ...]"
choose_python
# the run file's threads_per_rank decides; OpenMP must not take every core in every rank before it is read
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[[ $1 != --hostfile ]] || start_on_hosts train "${@:2}"
ranks="$(num_ranks)" || exit
exec "$PYTHON" "$VLMDIST_HOME/launch/start_ranks.py" torchrun --standalone --nproc-per-node "$ranks" -m vlmdist train "$@"
