#!/usr/bin/env bash
# Throughput of a run file on 1, 2, 4, ... nodes of one allocation, all of them last.
#
#   sbatch --nodes=8 slurm/bench.sh RUN.yaml [--steps N] [section.field=value ...]
#
# One srun after the other, each on the first nodes of the job, by `vlmdist bench RUN.yaml --json FILE`. Their files are
# JOBNAME-JOBID-nodes-001.json and so on beside the log; after a requeue, those that are there are not measured again.
# At the end they are put side by side: JOBNAME-JOBID-sweep.md, .json and .png. A run file with train.global_batch_size
# shows strong scaling (the same batch on more nodes), one with train.gradient_accumulation_steps weak scaling.

# name in squeue and of the log
#SBATCH --job-name=vlmdist-bench
# machines
#SBATCH --nodes=2
# ranks a machine: one a GPU
#SBATCH --ntasks-per-node=2
# GPUs a machine, or --gres=gpu:v100:2; to ask by --gpus-per-node or --gpus-per-task, give --gres=none too
#SBATCH --gres=gpu:2
# cores a rank
#SBATCH --cpus-per-task=4
# host memory a core
#SBATCH --mem-per-cpu=4G
# longest run, hh:mm:ss
#SBATCH --time=01:00:00
# SIGUSR1 to the batch shell this many seconds before the end: time to end the ranks and requeue
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

[[ $# -ge 1 ]] || die "usage: sbatch --nodes=N slurm/bench.sh RUN.yaml [--steps N] [section.field=value ...]"
sweep_nodes "$@"
