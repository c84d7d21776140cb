#!/usr/bin/env bash
# Scanned receipts to JSON: Mini-InternVL-Chat-2B-V1-5, NF4 QLoRA, on one GPU of 10 GB or more as published.
#
#   sbatch slurm/train_internvl_sroie.sh
#   sbatch --ntasks-per-node=4 --gres=gpu:4 slurm/train_internvl_sroie.sh output_dir=/scratch/r1
#
# What sbatch is told on its command line wins over the lines below. Arguments after the script are section.field=value of the
# run file launch/runs/internvl_sroie.yaml; relative paths are taken from the folder in which sbatch was called. The same by
# environment: VLMDIST_MODEL (folder or hub name), VLMDIST_DATA (folder with the shards, in train/ test/),
# VLMDIST_OUT (run folder). The cluster's facts (modules, environment, caches) go into slurm/cluster.env.

# name in squeue and of the log
#SBATCH --job-name=internvl-sroie
# machines
#SBATCH --nodes=1
# ranks a machine: one a GPU
#SBATCH --ntasks-per-node=1
# GPUs a machine, or --gres=gpu:v100:2; to ask by --gpus-per-node or --gpus-per-task, give --gres=none too
#SBATCH --gres=gpu:1
# cores a rank: loader workers cut the pictures into tiles there
#SBATCH --cpus-per-task=6
# host memory a core
#SBATCH --mem-per-cpu=4G
# longest run, hh:mm:ss; a run that needs longer saves, requeues itself and goes on
#SBATCH --time=02:00:00
# SIGUSR1 to the batch shell this many seconds before the end: time to finish a step and save
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

train_recipe "$home/launch/runs/internvl_sroie.yaml" "$@"
