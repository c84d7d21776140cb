# shellcheck shell=bash
# Sourced by the job scripts of this folder: everything they share. A script names its command and calls run_ranks.
#
# Life of a job: Slurm sends SIGUSR1 to the batch shell ahead of the time limit (--signal=B:USR1@...), or SIGTERM when it
# takes the nodes back. Training ranks finish their micro-batch, save a checkpoint and end with 85; the job puts itself back
# into the queue and, when it starts again, goes on with the very next sample. A start that fails is tried again too, but
# the third one that ends at the same step is the last.

slurm_folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
VLMDIST_CONTAINER=()    # both are set by cluster.env, if at all
VLMDIST_SRUN_OPTIONS=() #
if [[ -f $slurm_folder/cluster.env ]]; then # the cluster's facts; see cluster.env.example
    # shellcheck source=slurm/cluster.env.example
    source "$slurm_folder/cluster.env"
fi
# shellcheck source=launch/environment.sh
source "$slurm_folder/../launch/environment.sh"
# shellcheck source=slurm/run_file.sh
source "$slurm_folder/run_file.sh"

STOPPED=85 # exit codes of vlmdist
WRONG_INPUT=2
RESEND_SECONDS=10
MAX_FAILURES=3         # at the same step
NEAR_LIMIT_SECONDS=900 # of the time limit: a stop this close to it is the limit's
CONTROL_SECONDS=60     # for Slurm to end this shell after a requeue

# the id of an array is that of its last task too, and means all of them: show and requeue must not
job="$SLURM_JOB_ID"
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
# what stands beside the log: its name is the same after a requeue, and all nodes see it
log="$(readlink "/proc/$$/fd/1")"
[[ -f $log ]] || log="$SLURM_SUBMIT_DIR/vlmdist-$job"

stop_asked='' # by Slurm: the signal's name
trap 'stop_asked=USR1' USR1
trap 'stop_asked=TERM' TERM

# --- a recipe of launch/runs --------------------------------------------------------------------------------------------

train_recipe() { # RUN_FILE ARGUMENTS of vlmdist train: with VLMDIST_MODEL, VLMDIST_DATA, VLMDIST_OUT in the run file's place
    local places
    mapfile -t places < <(places_of "$1")
    run_ranks train "$1" "${places[@]}" "${@:2}"
}

# --- ranks --------------------------------------------------------------------------------------------------------------

run_ranks() { # ARGUMENTS of vlmdist: one srun task a rank; ends the job with its exit code, or puts it back into the queue
    local steps_of
    steps_of="$(run_folder "${@:2}")"
    case "$1" in
    train) progress() { last_step "$steps_of"; } ;;
    *) progress() { num_files "$steps_of/eval"; } ;; # each batch of answers is a file
    esac
    begin "$@"
    # A rank that stopped on request exits 85. srun must not take that for a crash and kill the others while they still end,
    # so rank.sh turns it into 0 and leaves this mark.
    export VLMDIST_STOPPED="$log.stopped" VLMDIST_RANK_LOG="$log"
    rm -f "$VLMDIST_STOPPED"
    if [[ $1 == train ]]; then
        export VLMDIST_STOP_SIGNAL=USR1
    else
        export VLMDIST_STOP_SIGNAL=TERM # what is finished is on disk: there is nothing to save
    fi
    local code
    supervise "$VLMDIST_STOP_SIGNAL" "${SRUN[@]}" "${RANK[@]}" -m vlmdist "$@"
    code=$?
    # ranks that srun ends after another one crashed save too if they can; that is no reason to take it for a stop
    if [[ -e $VLMDIST_STOPPED ]] && { ((code == 0)) || [[ -n $stopped_by ]]; }; then
        code=$STOPPED
    elif [[ $VLMDIST_STOP_SIGNAL == TERM && -n $stopped_by ]] && ((code != 0)); then
        code=$STOPPED
    fi
    rm -f "$VLMDIST_STOPPED"
    end_job "$code"
}

begin() { # ARGUMENTS of vlmdist: what every job with ranks does first; sets SRUN and RANK, the words before "-m vlmdist"
    choose_rank_python
    set_rendezvous
    set_environment
    print_facts "$@"
    refuse_more_ranks_than_gpus
    note_start
    export VLMDIST_REFUSED="$log.refused" # a mark of a rank that was given wrong input (see rank.sh)
    rm -f "$VLMDIST_REFUSED"
    # --export: a job submitted with --export=NONE would hand its ranks an empty environment
    SRUN=(srun --export=ALL --kill-on-bad-exit=1 --wait=60 "${VLMDIST_SRUN_OPTIONS[@]}")
    RANK=(bash "$slurm_folder/rank.sh" "${VLMDIST_CONTAINER[@]}" "$PYTHON")
}

sweep_nodes() { # ARGUMENTS of vlmdist bench: on 1, 2, 4, ... and all nodes of the job, one after the other
    progress() { find "$(dirname "$log")" -path "${log%.out}-nodes-*.json" | wc -l; }
    begin bench "$@"
    export VLMDIST_STOP_SIGNAL=TERM VLMDIST_RANK_LOG="$log" VLMDIST_STOPPED="$log.stopped"
    local nodes=1 all="$SLURM_JOB_NUM_NODES" ranks=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES)) first file code
    while true; do
        first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$nodes" | paste -sd,)"
        file="$(printf '%s-nodes-%03d.json' "${log%.out}" "$nodes")"
        if [[ ! -s $file ]]; then
            echo "== $nodes of $all nodes: $((nodes * ranks)) ranks on $first"
            supervise TERM "${SRUN[@]}" --nodes="$nodes" --ntasks=$((nodes * ranks)) --nodelist="$first" \
                "${RANK[@]}" -m vlmdist bench "$@" --json "$file"
            code=$?
            [[ -z $stopped_by ]] || end_job "$STOPPED"
            ((code == 0)) || end_job "$code"
        fi
        ((nodes < all)) || break
        nodes=$((2 * nodes < all ? 2 * nodes : all))
    done
    format_sweep
    end_job $?
}

format_sweep() { # prints the table of all its results, and writes it beside the log: Markdown, JSON, picture
    local results="${log%.out}-nodes" sweep="${log%.out}-sweep"
    echo "== side by side: $sweep.md, .json, .png"
    "${SRUN[@]}" --nodes=1 --ntasks=1 "${VLMDIST_CONTAINER[@]}" "$PYTHON" -m vlmdist bench "$results"-*.json \
        --json "$sweep.json" --png "$sweep.png" >"$sweep.md" || return
    cat "$sweep.md"
}

run_here() { # ARGUMENTS of python, %a in them for the number of the array task: on this node, without ranks
    local words=("${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}") i out=''
    for ((i = 1; i < ${#words[@]}; i++)); do
        [[ ${words[i - 1]} != --out ]] || out="${words[i]}"
    done
    progress() { num_files "$(dirname "$out")/.$(basename "$out").unfinished"; } # see shards/README.md
    choose_python
    note_start
    echo "== job $job ($SLURM_JOB_NAME), restart ${SLURM_RESTART_COUNT:-0}, $(date '+%F %T') on $(hostname)"
    echo "== ${words[*]}"
    local code
    supervise TERM "$PYTHON" "${words[@]}"
    code=$?
    [[ -z $stopped_by ]] || ((code <= 128)) || code=$STOPPED # ended by the signal: begins anew
    ((code == STOPPED)) || end_for_good "$code"              # nothing here fails by chance, as ranks do
    end_job "$code"
}

supervise() { # SIGNAL COMMAND...: runs it to its end and returns its exit code; a request to stop reaches it as SIGNAL
    local stop_signal="$1" pid code resender=
    stopped_by=''
    "${@:2}" &
    pid=$!
    while true; do
        if [[ -z $stop_asked ]]; then
            wait "$pid"
            code=$?
        fi
        [[ -n $stop_asked ]] || break # it has ended; else a trap cut the wait short
        echo "== job $job: SIG$stop_asked; asked to save and stop"
        stopped_by="$stop_asked" stop_asked=''
        is_node_lost || forget_start
        if [[ -z $resender ]]; then
            # again and again, because a rank that is only just starting cannot hear it yet; srun dies of a SIGTERM
            (while kill "-$stop_signal" "$pid" 2>/dev/null; do sleep "$RESEND_SECONDS"; done) &
            resender=$!
        fi
    done
    [[ -z $resender ]] || kill "$resender" 2>/dev/null
    if ((code == 0)) && is_node_lost; then # srun may say 0 then
        code=1
    fi
    return "$code"
}

choose_rank_python() { # sets PYTHON: in a container the image's own, else as everywhere (launch/environment.sh)
    if ((${#VLMDIST_CONTAINER[@]} + ${#VLMDIST_SRUN_OPTIONS[@]} == 0)); then
        choose_python
        return
    fi
    PYTHON="${VLMDIST_VENV:+$VLMDIST_VENV/bin/}python3"
    export PYTHONPATH="$VLMDIST_HOME${PYTHONPATH:+:$PYTHONPATH}" # this repository, whatever the image has
}

refuse_more_ranks_than_gpus() {
    local gpus="${SLURM_GPUS_ON_NODE:-0}" ranks=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || return 0 # a CPU partition
    ((ranks <= gpus)) || die "$ranks ranks a node but $gpus GPUs: one rank a GPU, --ntasks-per-node=$gpus"
    # both are granted together by some versions of Slurm, and by some not
    [[ -z ${SLURM_GPUS_PER_NODE:-} || ${SLURM_GPUS_PER_NODE##*:} == "$gpus" ]] ||
        die "--gpus-per-node=$SLURM_GPUS_PER_NODE, but the job has $gpus GPUs a node: the script's --gres counts too;" \
            "submit it with --gres=none beside"
    ((ranks == gpus)) || echo "== note: $ranks ranks a node and $gpus GPUs; --ntasks-per-node=$gpus uses them all"
}

# --- the rendezvous -----------------------------------------------------------------------------------------------------

set_rendezvous() { # sets MASTER_ADDR, MASTER_PORT: on this node, the first of the job, where rank 0 runs
    local head address=''
    read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [[ -n ${VLMDIST_INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME="$VLMDIST_INTERFACE" GLOO_SOCKET_IFNAME="$VLMDIST_INTERFACE"
        MASTER_ADDR="$(address_of "$VLMDIST_INTERFACE")"
        [[ -n $MASTER_ADDR ]] || die "VLMDIST_INTERFACE=$VLMDIST_INTERFACE: $(hostname) has no such interface, or no" \
            "address on it; there are $(ip -o addr show scope global | awk '{print $2}' | sort -u | xargs)"
    else
        # the address Slurm itself uses: node names do not resolve everywhere
        MASTER_ADDR="$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
        MASTER_ADDR="${MASTER_ADDR:-$head}"
        read -r address _ < <(getent ahosts "$MASTER_ADDR")
        # a name that is unknown, or that only means this machine (127.0.1.1 on Debian): an address of this node
        if [[ -z $address || ($address != "$MASTER_ADDR" && ($address == 127.* || $address == ::1)) ]]; then
            read -r MASTER_ADDR _ < <(hostname -I)
        fi
    fi
    choose_port
    export MASTER_ADDR MASTER_PORT
}

address_of() { # INTERFACE of this node: its address, IPv4 before IPv6; a link-local one is of no use to others
    local family
    for family in -4 -6; do
        ip -o "$family" addr show dev "$1" scope global 2>/dev/null | awk '{sub("/.*", "", $4); print $4}'
    done | head -n 1
}

choose_port() { # sets MASTER_PORT
    # From the job id, so that jobs on one node keep apart, below 32768, where the kernel takes ports for connections. Taken,
    # or meant by another job whose ranks are only starting (it holds the lock): another one, far from those of the next ids.
    local try first=$((SLURM_JOB_ID % 20000)) lock
    for ((try = 0; try < 50; try++)); do
        MASTER_PORT=$((12000 + (first + try * 7919) % 20000))
        [[ -z ${VLMDIST_PORT:-} ]] || MASTER_PORT="$VLMDIST_PORT"
        lock="/tmp/vlmdist-port-$MASTER_PORT"
        # held by this shell to its end
        if ! port_is_taken "$MASTER_PORT" && { exec 8>"$lock"; } 2>/dev/null && flock --nonblock 8; then
            trap 'rm -f "'"$lock"'"' EXIT
            return
        fi
        [[ -z ${VLMDIST_PORT:-} ]] || die "port $VLMDIST_PORT (VLMDIST_PORT) is taken on $(hostname)"
    done
    die "no free port found on $(hostname): name one in VLMDIST_PORT"
}

port_is_taken() { # PORT: someone listens there, on whatever address
    local table
    for table in /proc/net/tcp /proc/net/tcp6; do
        [[ ! -r $table ]] || ! awk '{print $2, $4}' "$table" | grep -qi ":$(printf '%04X' "$1") 0A$" || return 0
    done
    return 1
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
    echo "== job $job ($SLURM_JOB_NAME), restart ${SLURM_RESTART_COUNT:-0}, $(date '+%F %T')"
    echo "== nodes $SLURM_JOB_NODELIST: $SLURM_NTASKS ranks on $SLURM_JOB_NUM_NODES, rank 0 at $MASTER_ADDR port $MASTER_PORT"
    if ((${#VLMDIST_CONTAINER[@]} + ${#VLMDIST_SRUN_OPTIONS[@]})); then
        echo "== $PYTHON in: ${VLMDIST_SRUN_OPTIONS[*]} ${VLMDIST_CONTAINER[*]}"
    else
        echo "== $("$PYTHON" --version) in $PYTHON, $(srun --version), $(num_gpus) GPUs on $(hostname)"
    fi
    local name
    for name in OMP_NUM_THREADS "${!NCCL_@}" "${!GLOO_@}" HF_HOME HF_HUB_OFFLINE CUDA_VISIBLE_DEVICES; do
        [[ -z ${!name+set} ]] || printf '   %s=%s' "$name" "${!name}"
    done
    echo
    echo "== vlmdist $*"
}

# --- the end of a start -------------------------------------------------------------------------------------------------

end_job() { # EXIT_CODE: ends the job with it, or puts the job back into the queue
    local code="$1"
    ((code <= 128)) || code=1 # srun gives the code of the ranks it ended itself, not of the one that failed first
    [[ $code != 1 || ! -e $log.refused ]] || code=$WRONG_INPUT
    rm -f "$log.refused"
    case "$code" in
    0 | "$WRONG_INPUT") # as wrong the next time; the log says it all
        rm -f "$log".rank*
        ;;
    "$STOPPED")
        if is_near_limit && (($(progress) <= best)); then # too short for one step and a save: it would go round for ever
            count_failure "it was stopped ahead of the time limit"
        else
            note_progress
        fi
        ((failures > 0)) || rm -f "$log".rank*
        ((failures < MAX_FAILURES)) && requeue "stopped, and what was done is saved" && exit 0
        ;;
    *)
        count_failure "exit code $code"
        ((failures < MAX_FAILURES)) &&
            requeue "failed (exit code $code) at step $best; $((MAX_FAILURES - failures)) more may end there" && exit 0
        ;;
    esac
    end_for_good "$code"
}

end_for_good() { # EXIT_CODE; should the job be requeued by hand, it may fail as often again
    rm -f "$log.starts"
    echo "== job $job ends with exit code $1"
    exit "$1"
}

requeue() { # WHY: back into the queue with the same job id; the log goes on in the same file
    local why="$1" state answer
    state="$(scontrol show job --oneliner "$job" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')"
    case "$state" in
    CANCELLED)
        echo "== job $job: $why; cancelled, so submit it again to go on"
        return 1
        ;;
    PENDING | REQUEUED)
        echo "== job $job: $why; Slurm has requeued it already"
        return 0
        ;;
    esac
    if answer="$(scontrol requeue "$job" 2>&1)"; then
        echo "== job $job: $why; requeued"
        sleep "$CONTROL_SECONDS" # Slurm ends this shell; to exit by itself first would finish the job
        return 0
    fi
    if [[ $answer == *pending* ]]; then # it was quicker
        echo "== job $job: $why; Slurm has requeued it already"
        return 0
    fi
    echo "== job $job: $why; it could not be requeued ($answer), so submit it again to go on"
    return 1
}

is_near_limit() { # now, of the limit as it was at the start: preemption with a grace time moves it
    [[ -n $limit_at ]] && (($(date +%s) > limit_at - NEAR_LIMIT_SECONDS))
}

is_node_lost() {
    sinfo --nodes="$SLURM_JOB_NODELIST" --noheader --format=%T 2>/dev/null | grep -q '[*]\|down\|fail'
}

# --- starts that get no further -----------------------------------------------------------------------------------------
#
# Slurm starts a job again after a lost node, and this file after a failure: for ever, where it is the job that brings the
# node down. LOG.starts says, in one line, which job, the furthest step of all starts, how many starts have failed there,
# and whether one is under way: if so when the next one begins, its node was lost.

note_start() {
    local noted='' open=0 end
    [[ ! -f $log.starts ]] || read -r noted best failures open <"$log.starts"
    if [[ $noted != "$job" ]]; then # none, or of another job with the same log
        best="$(progress)" failures=0 open=0
    fi
    end="$(scontrol show job --oneliner "$job" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')"
    limit_at="$(date -d "$end" +%s 2>/dev/null)" # none: Unknown
    ((open == 0)) || count_failure "it ended without a word: a lost node, or no memory"
    ((failures < MAX_FAILURES)) || end_for_good 1
    write_starts 1
}

forget_start() { # it was asked to stop: no failure
    write_starts 0
}

note_progress() {
    local step
    step="$(progress)"
    ((step <= best)) || best="$step" failures=0
    write_starts 0
}

count_failure() { # WHAT happened
    note_progress
    failures=$((failures + 1))
    write_starts 0
    ((failures < MAX_FAILURES)) || cat <<END
== job $job has ended $failures times at step $best without getting any further, and is not requeued.
   The last time: $1. What the ranks said is above, and in $log.rank* where there are any.
   Once that is mended, submit it again: it goes on from what is saved.
END
}

write_starts() { # OPEN
    echo "$job $best $failures $1" 2>/dev/null >"$log.starts"
}

num_files() { # FOLDER: prints how many files are in and under it
    find "$1" -type f 2>/dev/null | wc -l
}
