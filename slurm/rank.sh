#!/usr/bin/env bash
# One rank: started by srun from job.sh, one a task. Runs the command in its arguments.
# The signals are for that command, which sets its own handlers; before it has, and for this shell, they must not be deadly.
trap '' USR1 TERM
"$@"
code=$?
if ((code == 85)); then # stopped on request with a checkpoint: not a crash (see job.sh)
    if [[ -d $(dirname "$VLMDIST_STOPPED") ]]; then # only on the first node
        : >"$VLMDIST_STOPPED"
    fi
    exit 0
fi
exit "$code"
