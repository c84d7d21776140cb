#!/usr/bin/env bash
# One rank: started by srun from job.sh, one a task. Runs the command in its arguments.
if [[ $VLMDIST_STOP_SIGNAL == USR1 ]]; then
    # the signals are for that command, which sets its own handlers; before it has, and for this shell, they must not be deadly
    trap '' USR1 TERM
fi

# Gloo takes the address of the machine's own name, which is often unknown or 127.0.1.1: the interface towards rank 0 is the
# right one. Its name may be another on every node.
if [[ -z ${GLOO_SOCKET_IFNAME:-} ]] && command -v ip >/dev/null; then
    read -r address _ < <(getent ahosts "$MASTER_ADDR")
    interface="$(ip -o addr show | awk -v a="${address:-$MASTER_ADDR}" '{sub("/.*", "", $4); if ($4 == a) {print $2; exit}}')"
    [[ -n $interface ]] ||
        interface="$(ip -o route get "${address:-$MASTER_ADDR}" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p')"
    [[ -z $interface ]] || export GLOO_SOCKET_IFNAME="$interface"
fi

# everything goes to the job's log; a file for each rank too, which job.sh removes after a good end
exec > >(exec tee -a "$VLMDIST_RANK_LOG.rank$SLURM_PROCID" 2>/dev/null) 2>&1
tee_pid=$!
"$@"
code=$?
exec >&- 2>&-
# its last words; a worker that outlives its rank must not keep the rank's end from srun
for ((i = 0; i < 50; i++)); do
    kill -0 "$tee_pid" 2>/dev/null || break
    sleep 0.1
done

if ((code == 85)) && : 2>/dev/null >"$VLMDIST_STOPPED"; then # stopped on request: not a crash (see job.sh)
    exit 0
fi
# srun ends the other ranks, and their end is the job's exit code: the job would be tried again (see job.sh)
((code != 2)) || : 2>/dev/null >"$VLMDIST_REFUSED"
exit "$code"
