#!/usr/bin/env bash
# The commands that `--runner array` prints, as Slurm arrays: one a stage, each after the one before.
#
#   vr engine run --config F.py --workdir /shared/W --runner array --shards 256 > run.sh
#   launch/slurm_array.sh run.sh --time=4:00:00 --gpus=1       # what follows are options of sbatch
#   vr data prepare FILES --media DIR --out OUT --runner array > prepare.sh
#
# A stage that fails ends those behind it; the same command goes on with what is not done. TASKS (at
# most; 1000, as many as Slurm takes by default) share the commands of a stage. The stages lie in
# run.sh.stages, which all nodes must see. Without Slurm: launch/slurm_array.sh --dry-run run.sh
. "$(dirname "$0")/run.sh"
[[ ${1:-} == --dry-run ]] && export DRY_RUN=1 && shift

if [[ $# -lt 1 || ! -f $1 ]]; then
  echo "usage: launch/slurm_array.sh [--dry-run] FILE [OPTIONS OF SBATCH]" >&2
  exit 2
fi
folder=$(realpath "$1").stages
name=$(basename "$1" .sh)
shift
rm -rf "$folder"
mkdir -p "$folder"
# A comment begins a stage; several in a row begin one.
awk -v folder="$folder" '
  /^#/ { begun = 0; next }
  NF { if (!begun) { begun = 1; file = sprintf("%s/%03d", folder, ++stage) } print > file }
' "${folder%.stages}"

before=
for stage in "$folder"/*; do
  [[ -f $stage ]] || { echo "${folder%.stages}: no commands in it" >&2; exit 2; }
  count=$(wc -l <"$stage")
  tasks=$((count < ${TASKS:-1000} ? count : ${TASKS:-1000}))
  # shellcheck disable=SC2016 # the node's shell, not this one, knows the number of the task
  task='exec bash -e -c "$(sed -n "$SLURM_ARRAY_TASK_ID~'"$tasks"'p" '"${stage@Q}"')"'
  command=(sbatch --parsable --job-name "$name" --array "1-$tasks" --requeue --open-mode append
    --output "$stage-%a.log" --wrap "$task" "$@")
  [[ -n $before ]] && command+=(--dependency "afterok:$before" --kill-on-invalid-dep yes)
  if dry_run; then
    run "${command[@]}"
    before=JOB
  else
    before=$("${command[@]}")
    before=${before%%;*} # of a federation the cluster's name follows
    echo "$(basename "$stage"): job $before, $tasks tasks for $count commands"
  fi
done
