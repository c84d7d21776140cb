# shellcheck shell=bash
# Sourced by the job scripts of this folder: everything they share. A script names its vlmdist command and calls run_ranks.
#
# Life of a job: Slurm sends SIGUSR1 to the batch shell ahead of the time limit (--signal=B:USR1@...), or SIGTERM when it
# takes the nodes back. Both go on to every rank as SIGUSR1; the ranks finish their step, save a checkpoint and end with 85;
# the job puts itself back into the queue and, when it starts again, goes on with the very next sample.

slurm_folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
if [[ -f $slurm_folder/cluster.env ]]; then # the cluster's facts; see cluster.env.example
    # shellcheck source=slurm/cluster.env.example
    source "$slurm_folder/cluster.env"
fi
# shellcheck source=launch/environment.sh
source "$slurm_folder/../launch/environment.sh"

STOPPED_WITH_CHECKPOINT=85
RESEND_SECONDS=10

run_ranks() { # ARGUMENTS of vlmdist: one srun task a rank; ends the job with its exit code, or puts it back into the queue
    choose_python
    set_rendezvous
    set_environment
    print_facts "$@"

    # A rank that stopped on request exits 85. srun must not take that for a crash and kill the others while they still end,
    # so rank.sh turns it into 0 and leaves this mark on the first node, where the batch shell runs.
    VLMDIST_STOPPED="$(mktemp -d)/stopped" || die "no folder for temporary files on $(hostname)"
    export VLMDIST_STOPPED

    local code
    trap 'stop_asked=USR1' USR1
    trap 'stop_asked=TERM' TERM
    srun --kill-on-bad-exit=1 --wait=60 bash "$slurm_folder/rank.sh" "$PYTHON" -m vlmdist "$@" &
    wait_for_ranks $!
    code=$?

    # the ranks that srun ends after another one crashed save too if they can; that is no reason to start again
    if [[ -e $VLMDIST_STOPPED ]] && { ((code == 0)) || [[ -n $stop_asked_once ]]; }; then
        code=$STOPPED_WITH_CHECKPOINT
    fi
    rm -rf "$(dirname "$VLMDIST_STOPPED")"
    if ((code == STOPPED_WITH_CHECKPOINT)); then
        requeue && exit 0
    fi
    ((code <= 128)) || code=1 # srun gives the code of the ranks it ended itself, not of the one that failed first
    echo "== job $SLURM_JOB_ID ends with exit code $code"
    exit "$code"
}

wait_for_ranks() { # PID of srun: returns its exit code; passes a request to stop on to the ranks
    local srun_pid="$1" code resender=
    stop_asked='' stop_asked_once=''
    while true; do
        wait "$srun_pid"
        code=$?
        [[ -n $stop_asked ]] || break # srun has ended; else a trap cut the wait short
        echo "== job $SLURM_JOB_ID: SIG$stop_asked; the ranks are asked to save and stop"
        stop_asked='' stop_asked_once=1
        if [[ -z $resender ]]; then
            # again and again, because a rank that is only just starting cannot hear it yet; srun dies of a SIGTERM, so USR1
            (while kill -USR1 "$srun_pid" 2>/dev/null; do sleep "$RESEND_SECONDS"; done) &
            resender=$!
        fi
    done
    [[ -z $resender ]] || kill "$resender" 2>/dev/null
    return "$code"
}

requeue() { # back into the queue with the same job id; the log goes on in the same file
    local state
    state="$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')"
    case "$state" in
    CANCELLED)
        echo "== job $SLURM_JOB_ID was cancelled; its checkpoint is saved, submit it again to go on"
        return 1
        ;;
    PENDING | REQUEUED)
        echo "== job $SLURM_JOB_ID: checkpoint saved; Slurm has requeued it already"
        return 0
        ;;
    esac
    if scontrol requeue "$SLURM_JOB_ID"; then
        echo "== job $SLURM_JOB_ID: checkpoint saved; requeued"
        sleep 60 # Slurm ends this shell; to exit by itself first would finish the job
        return 0
    fi
    echo "== job $SLURM_JOB_ID: checkpoint saved, but it could not be requeued (state $state); submit it again to go on"
    return 1
}

set_rendezvous() {
    local head
    read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # the address Slurm itself uses: node names do not resolve everywhere
    MASTER_ADDR="$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
    MASTER_ADDR="${MASTER_ADDR:-$head}"
    # from the job id, so that jobs on one node keep apart; below 32768, where the kernel hands out ports for connections
    MASTER_PORT="${VLMDIST_PORT:-$((12000 + SLURM_JOB_ID % 20000))}"
    export MASTER_ADDR MASTER_PORT
    if [[ -n ${VLMDIST_INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME="$VLMDIST_INTERFACE" GLOO_SOCKET_IFNAME="$VLMDIST_INTERFACE"
    fi
}

set_environment() {
    # srun takes --cpus-per-task from the job only up to Slurm 21.08
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    export PYTHONUNBUFFERED=1
    # compute nodes often have no way out, and N ranks asking the hub at once is no kindness either
    if [[ ${VLMDIST_ONLINE:-0} != 1 ]]; then
        export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    fi
}

print_facts() { # ARGUMENTS of vlmdist
    echo "== job $SLURM_JOB_ID ($SLURM_JOB_NAME), restart ${SLURM_RESTART_COUNT:-0}, $(date '+%F %T')"
    echo "== nodes $SLURM_JOB_NODELIST: $SLURM_NTASKS ranks on $SLURM_JOB_NUM_NODES, rendezvous at $MASTER_ADDR:$MASTER_PORT"
    echo "== $("$PYTHON" --version) in $PYTHON, $(srun --version), $(num_gpus) GPUs on $(hostname)"
    local name
    for name in OMP_NUM_THREADS NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME HF_HOME HF_HUB_OFFLINE CUDA_VISIBLE_DEVICES; do
        [[ -z ${!name+set} ]] || printf '   %s=%s' "$name" "${!name}"
    done
    echo
    echo "== vlmdist $*"
}
