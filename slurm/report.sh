#!/usr/bin/env bash
# One HTML page of one or several runs: a job without GPUs, the last one of submit.sh.
#
#   sbatch slurm/report.sh RUN_DIR [MORE ...] [--out FILE.html]

# name in squeue and of the log
#SBATCH --job-name=vlmdist-report
# machines
#SBATCH --nodes=1
# one process, which starts its own workers
#SBATCH --ntasks=1
# its cores
#SBATCH --cpus-per-task=1
# host memory a core
#SBATCH --mem-per-cpu=4G
# longest run, hh:mm:ss
#SBATCH --time=00:20:00
# SIGUSR1 to the batch shell this many seconds before the end
#SBATCH --signal=B:USR1@30
# a preempted job, or one whose node died, goes back into the queue
#SBATCH --requeue
# what is written after a requeue is added to the log
#SBATCH --open-mode=append
# one log a job, in the folder in which sbatch was called
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this script from its spool folder. The repository is VLMDIST_HOME, else where the script was submitted
# from, else around the folder in which sbatch was called.
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "error: a job script: submit it with sbatch" >&2 && exit 2; }
home="${VLMDIST_HOME:-}"
if [[ -z $home ]]; then
    home="$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///p;q}')"
    while [[ $home == */slurm/* && ! -f $home/slurm/job.sh ]]; do home="${home%/slurm/*}"; done
    [[ -f $home/slurm/job.sh ]] || home="$SLURM_SUBMIT_DIR"
    while [[ $home == */* && ! -f $home/slurm/job.sh ]]; do home="${home%/*}"; done
fi
[[ -f $home/slurm/job.sh ]] || { echo "error: the vlmdist repository was not found: set VLMDIST_HOME" >&2 && exit 2; }
# shellcheck source=slurm/job.sh
source "$home/slurm/job.sh"

[[ $# -ge 1 ]] || die "usage: sbatch slurm/report.sh RUN_DIR [MORE ...] [--out FILE.html]"
run_here -m vlmdist report "$@"
