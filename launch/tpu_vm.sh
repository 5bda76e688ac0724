#!/usr/bin/env bash
# A TPU VM pod (one slice) by queued resources: from a checkout to a trained model, spot or not.
#
#   export NAME=vr ZONE=us-west4-a TYPE=v5litepod-64 SPOT=1
#   launch/tpu_vm.sh run --config stage3_instruct:data=/mnt/d,init=/mnt/s2p5 --workdir /mnt/W
#   launch/tpu_vm.sh follow | status | stop | delete
#
# `run` creates the pod if there is none, installs this checkout's HEAD on every host, trains, and
# after a preemption makes a new pod and goes on from the last checkpoint, up to RETRIES times.
# `stop` has the run save and end. W and the data lie where every host sees them: MOUNT is a command
# that mounts it, such as "sudo mount -o hard 10.0.0.2:/share /mnt".
. "$(dirname "$0")/run.sh"
[[ ${1:-} == --dry-run ]] && export DRY_RUN=1 && shift

NAME=${NAME:-vr}
ZONE=${ZONE:?the zone, such as us-west4-a}
TYPE=${TYPE:?the accelerator type, such as v5litepod-64}
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # runtime; v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e)
RETRIES=${RETRIES:-20}
where=(--zone "$ZONE")
verb=${1:-}
[[ $# -gt 0 ]] && shift

queue() { run gcloud compute tpus queued-resources "$1" "$NAME" "${where[@]}" "${@:2}"; }
on_hosts() { # WORKERS COMMAND
  run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker "$1" --command "$2"
}
state() { queue describe --format 'value(state.state)' 2>/dev/null || echo NONE; }

create() {
  local spot=()
  [[ -n ${SPOT:-} ]] && spot=(--spot)
  queue create --node-id "$NAME" --accelerator-type "$TYPE" --runtime-version "$VERSION" "${spot[@]}"
  dry_run && return
  until [[ $(state) == ACTIVE ]]; do
    if [[ $(state) == FAILED ]]; then return 1; fi
    echo "$NAME: $(state)" >&2
    sleep 30
  done
}

install() {
  local archive=/tmp/vr_jax.tar.gz
  run git archive -o "$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:" "${where[@]}" --worker all
  on_hosts all "mkdir -p vr_jax && tar xzf vr_jax.tar.gz -C vr_jax && python3 -m venv env \
&& env/bin/pip install -q './vr_jax[tpu]' && { ${MOUNT:-true}; }"
}

train() { # the arguments of vr train
  on_hosts all "set -o pipefail; VR_COORDINATOR=auto env/bin/vr train ${*@Q} 2>&1 | tee -a vr.log"
}

case $verb in
  run)
    for ((try = 0; try <= RETRIES; try++)); do
      if dry_run || [[ $(state) != ACTIVE ]]; then
        queue delete --force --quiet 2>/dev/null || true # what a preemption left
        create || continue
        install
      fi
      if train "$@"; then exit 0; fi
      # A run that failed on a pod that stands would fail again.
      if [[ $(state) == ACTIVE ]]; then exit 1; fi
      echo "$NAME: $(state); attempt $((try + 1)) of $RETRIES" >&2
    done
    exit 1
    ;;
  follow) on_hosts 0 'tail -n 50 -f vr.log' ;;
  status) queue describe ;;
  stop) on_hosts all 'pkill -TERM -f "vr train"' ;;
  delete) queue delete --force --quiet ;;
  *)
    echo "usage: launch/tpu_vm.sh [--dry-run] run|follow|status|stop|delete ..." >&2
    exit 2
    ;;
esac
