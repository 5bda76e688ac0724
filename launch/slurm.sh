#!/usr/bin/env bash
# A Slurm cluster of GPU nodes: one process a node, which drives all its GPUs.
#
#   sbatch --nodes 8 --gpus-per-node 8 launch/slurm.sh --config F.py --workdir /shared/W
#
# Ten minutes before the time limit, and on preemption (with or without GraceTime), the run saves;
# then the job queues again and goes on. `scancel --signal TERM --batch JOB` saves and stops. On this
# machine, without Slurm: launch/slurm.sh --dry-run ...
#SBATCH --job-name=vr
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vr-%j.log
#SBATCH --signal=B:USR1@600
set -euo pipefail # sbatch runs a copy elsewhere: nothing is sourced
[[ ${1:-} == --dry-run ]] && export DRY_RUN=1 && shift
# --kill-on-bad-exit: a process that died ends the step, so that the job does not wait in vain.
command=(srun --kill-on-bad-exit=1 vr train "$@")

if [[ -n ${DRY_RUN:-} ]]; then
  printf '%s\n' "${command[*]@Q}"
  exit
fi
again=
# scancel signals the processes of the step, not this script; srun itself would kill them. In the
# background, because it asks again for half a minute where the job is being taken down already.
trap 'again=1; interrupted=1; scancel --signal TERM "$SLURM_JOB_ID" &' USR1 # the time limit is near
trap 'interrupted=1; scancel --signal TERM "$SLURM_JOB_ID" &' TERM
"${command[@]}" &
step=$!
interrupted=1 # a signal ends `wait`, not the step: ask again
while [[ -n $interrupted ]]; do interrupted= && wait "$step" && code=0 || code=$?; done
# 143: stopped and saved. A job that is being preempted has been sent SIGTERM too, with GraceTime to
# itself; one that ends in that time would be a failed one.
if [[ $code == 143 ]] && scontrol show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; then again=1; fi
if [[ -n $again && $code != 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
