#!/usr/bin/env bash
# N processes of one run on this machine; to try out a run of many hosts without them.
#
#   launch/local.sh 2 --config F.py --workdir W     # what follows N are the arguments of vr train
#
# On CPU unless JAX_PLATFORMS says otherwise; JAX_NUM_CPU_DEVICES devices each. (One process drives
# all GPUs of a machine: `vr train` alone is right there.) SIGTERM and Ctrl-C save and stop.
. "$(dirname "$0")/run.sh"
[[ ${1:-} == --dry-run ]] && export DRY_RUN=1 && shift

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh [--dry-run] N --config F.py[:ARGS] --workdir W ..." >&2
  exit 2
fi
processes=$1
shift
port=${PORT:-$((20000 + RANDOM % 10000))}

pids=()
trap 'interrupted=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
  command=(env VR_COORDINATOR="localhost:$port" VR_PROCESSES="$processes" VR_PROCESS="$i"
    JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" vr train "$@")
  if dry_run; then
    run "${command[@]}"
  else
    "${command[@]}" &
    pids+=($!)
  fi
done

code=0
for pid in "${pids[@]}"; do
  interrupted=1 # a signal ends `wait`, not the process: ask again
  while [[ -n $interrupted ]]; do interrupted= && wait "$pid" && ended=0 || ended=$?; done
  [[ $ended == 0 ]] || code=$ended
done
exit "$code"
