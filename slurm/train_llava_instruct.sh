#!/usr/bin/env bash
# LLaVA-1.5-7B on the 260k conversations of llava-instruct-mix-vsft: two nodes of eight A100.
#
#   sbatch slurm/train_llava_instruct.sh                       second stage: projector and language model (llava_instruct.yaml)
#   sbatch slurm/train_llava_instruct.sh pretrain              first stage: the projector alone (llava_pretrain.yaml)
#   sbatch --nodes=4 --constraint=a100 slurm/train_llava_instruct.sh model.name_or_path=/models/llava output_dir=/scratch/r1
#
# The second stage begins with the projector of the first by adapt.init_from=RUN_FOLDER_OF_THE_FIRST.
#
# What sbatch is told on its command line wins over the lines below. Arguments after the script are section.field=value of the
# run file of the stage in launch/runs; relative paths are taken from the folder in which sbatch was called. The same by
# environment: VLMDIST_MODEL (folder or hub name), VLMDIST_DATA (folder with the shards, in train/ validation/ test/),
# VLMDIST_OUT (run folder). The cluster's facts (modules, environment, caches) go into slurm/cluster.env.

# name in squeue and of the log
#SBATCH --job-name=llava-instruct
# machines
#SBATCH --nodes=2
# ranks a machine: one a GPU
#SBATCH --ntasks-per-node=8
# GPUs a machine, or --gres=gpu:v100:2; to ask by --gpus-per-node or --gpus-per-task, give --gres=none too
#SBATCH --gres=gpu:8
# cores a rank: loader workers decode pictures there
#SBATCH --cpus-per-task=8
# host memory a core
#SBATCH --mem-per-cpu=6G
# longest run, hh:mm:ss; a run that needs longer saves, requeues itself and goes on
#SBATCH --time=24:00:00
# SIGUSR1 to the batch shell this many seconds before the end: a checkpoint of 7B in full is some 90 GB
#SBATCH --signal=B:USR1@300
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

stage=instruct
case "${1:-}" in
pretrain | instruct)
    stage="$1"
    shift
    ;;
esac
train_recipe "$home/launch/runs/llava_$stage.yaml" "$@"
