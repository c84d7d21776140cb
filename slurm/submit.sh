#!/usr/bin/env bash
# A whole recipe, one job after the other: shards, training, evaluation of the base model and of the trained one, report.
#
#   bash slurm/submit.sh llama3_receipts --source receipts_dataset.jsonl output_dir=/scratch/r1
#   bash slurm/submit.sh llava_instruct --partition=gpu --account=lab        the shards are there: begins with training
#
# The first word is a recipe: llama3_receipts, internvl_sroie, llava_instruct, moondream_currency. --source DATA puts a
# shard job in front (into VLMDIST_DATA, else where the run file looks for its shards). Other words with -- are sbatch's, for
# the jobs with GPUs; VLMDIST_CPU_OPTIONS of cluster.env are for those without. section.field=value goes to vlmdist. A job
# begins when the one before it has ended well; when one fails, those after it leave the queue.
slurm_folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
VLMDIST_CPU_OPTIONS=()
if [[ -f $slurm_folder/cluster.env ]]; then
    # shellcheck source=slurm/cluster.env.example
    source "$slurm_folder/cluster.env"
fi
set -euo pipefail # from here on: `module` and the like in cluster.env may not bear it
# shellcheck source=launch/environment.sh
source "$slurm_folder/../launch/environment.sh"
# shellcheck source=slurm/run_file.sh
source "$slurm_folder/run_file.sh"

usage="usage: bash slurm/submit.sh RECIPE [--source DATA] [--SBATCH_OPTION=VALUE ...] [section.field=value ...]"
recipe="${1:-}"
case "$recipe" in
llama3_receipts) shards=receipt_lines ;;
internvl_sroie) shards=sroie ;;
llava_instruct) shards=llava_instruct ;;
moondream_currency) shards=currency ;;
*) die "$usage; RECIPE is llama3_receipts, internvl_sroie, llava_instruct or moondream_currency" ;;
esac
shift
run_file="$VLMDIST_HOME/launch/runs/$recipe.yaml"

data='' options=() overrides=()
while (($#)); do
    case "$1" in
    --source)
        [[ $# -ge 2 ]] || die "--source needs a file or folder; $usage"
        data="$2"
        shift
        ;;
    --source=*) data="${1#--source=}" ;;
    --*=*) options+=("$1") ;;
    -*) die "$1: write options of sbatch as --name=value; $usage" ;;
    *=*) overrides+=("$1") ;;
    *) die "$1 is neither an option nor section.field=value; $usage" ;;
    esac
    shift
done
command -v sbatch >/dev/null || die "no sbatch here: submit from a login node of the cluster"

# the same for all jobs: where the run and its shards lie
mapfile -t places < <(places_of "$run_file")
out="$(run_folder "$run_file" "${places[@]}" "${overrides[@]}")"

submit() { # NAME SBATCH_ARGUMENTS...: sets id; the job begins after the one submitted before
    local after=()
    [[ -z ${id:-} ]] || after=("--dependency=afterok:$id" --kill-on-invalid-dep=yes)
    id="$(sbatch --parsable "${after[@]}" "${@:2}")" || exit
    id="${id%%;*}"
    printf '%-28s job %s\n' "$1" "$id"
}

id=''
if [[ -n $data ]]; then
    train="$(value_of "$run_file" '  ' train data.train "${places[@]}" "${overrides[@]}")"
    [[ $train == */train ]] || die "data.train=$train: shards are made in OUT/train, OUT/test; let it end with /train"
    submit "shards" "${VLMDIST_CPU_OPTIONS[@]}" "$slurm_folder/prepare_shards.sh" "$shards" \
        --source "$data" --out "${train%/train}"
fi
submit "training" "${options[@]}" "$slurm_folder/train_$recipe.sh" "${overrides[@]}"
submit "evaluation, base model" "${options[@]}" "$slurm_folder/evaluate.sh" "$out/run.yaml" --base
submit "evaluation, trained model" "${options[@]}" "$slurm_folder/evaluate.sh" "$out/run.yaml"
submit "report" "${VLMDIST_CPU_OPTIONS[@]}" "$slurm_folder/report.sh" "$out"
cat <<END
Look at them:      squeue --me --start
Logs:              NAME-JOBID.out in $PWD
Run folder:        $out (train.log, metrics.jsonl, eval/*/scores.json, at the end report.html)
Stop one:          scancel JOBID; those after it leave the queue
END
