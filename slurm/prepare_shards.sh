#!/usr/bin/env bash
# Data to shards, by a script of shards/ (see its README): a job without GPUs.
#
#   sbatch slurm/prepare_shards.sh llava_instruct --source /data/llava-instruct-mix-vsft/data --out /scratch/llava
#   sbatch --array=0-9 slurm/prepare_shards.sh foreign --source '/data/tars-%a/*.tar.gz' --out /scratch/captions-%a
#
# Arguments are the script's name and its own. A script uses all cores of one machine; a corpus too big for that is made in
# several, one an array task: %a is the number of the task, and the run file lists the corpora under data.train. A job that is
# stopped goes on with the parts that are missing where the script can (llava_instruct, label_with_teacher).

# name in squeue and of the log
#SBATCH --job-name=vlmdist-prepare
# machines
#SBATCH --nodes=1
# one process, which starts its own workers
#SBATCH --ntasks=1
# its cores: llava_instruct uses them all, and its speed grows with them
#SBATCH --cpus-per-task=16
# host memory a core
#SBATCH --mem-per-cpu=2G
# longest run, hh:mm:ss; what needs longer requeues itself and goes on
#SBATCH --time=08:00:00
# SIGUSR1 to the batch shell this many seconds before the end: time to finish a part
#SBATCH --signal=B:USR1@120
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

[[ $# -ge 1 ]] || die "usage: sbatch slurm/prepare_shards.sh SCRIPT ARGUMENTS... with a script of $home/shards"
script="$home/shards/${1%.py}.py"
[[ -f $script ]] ||
    die "no $script; there are $(cd "$home/shards" && grep -l '^if __name__' ./*.py | sed 's,./,,; s,.py$,,' | xargs)"
run_here "$script" "${@:2}"
