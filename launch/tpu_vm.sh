#!/usr/bin/env bash
# A TPU VM pod (one slice) by queued resources: from a checkout to a trained model, spot or not.
#
#   export NAME=vr ZONE=us-west4-a TYPE=v5litepod-64 SPOT=1
#   launch/tpu_vm.sh run --config stage3_instruct:data=/mnt/d,init=/mnt/s2p5 --workdir /mnt/W
#   launch/tpu_vm.sh follow | status | stop | delete
#
# `run` creates the pod if there is none, installs this checkout's HEAD on every host, trains, and
# after a preemption makes a new pod and goes on from the last checkpoint, up to RETRIES times. The
# run goes on in the hosts whether this connection holds or not; `run` again takes it up, and so
# does `run` itself when the connection broke. `stop` has the run save and end (exit code 143). W and the data lie where every host sees them: MOUNT is a command
# that mounts it, such as "sudo mount -o hard 10.0.0.2:/share /mnt".
. "$(dirname "$0")/run.sh"
[[ ${1:-} == --dry-run ]] && export DRY_RUN=1 && shift

NAME=${NAME:-vr}
ZONE=${ZONE:?the zone, such as us-west4-a}
TYPE=${TYPE:?the accelerator type, such as v5litepod-64}
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # runtime; v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e)
RETRIES=${RETRIES:-20}
POLL=${POLL:-5} # seconds between two looks at the state of a pod that may be going away
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
  # uv brings the Python that this project needs; that of the image may be older.
  on_hosts all "mkdir -p vr_jax && tar xzf vr_jax.tar.gz -C vr_jax \
&& python3 -m pip install -q --user uv && python3 -m uv venv -q --python 3.11 env \
&& python3 -m uv pip install -q --python env/bin/python './vr_jax[tpu]' && { ${MOUNT:-true}; }"
}

# Starts the run on every host, or takes up the one that is under way there; follows it and ends as
# it ends. A connection that breaks ends neither the run nor what writes its log.
train() { # the arguments of vr train
  on_hosts all "running() { kill -0 \$(cat vr.pid) 2>/dev/null; }; running || { rm -f vr.code; \
(trap '' HUP; VR_COORDINATOR=auto env/bin/vr train ${*@Q} 2>&1 | cat >>vr.log; \
echo \${PIPESTATUS[0]} >vr.code) </dev/null >/dev/null 2>/dev/null & echo \$! >vr.pid; }; \
touch vr.log; tail -n 0 -f --pid=\$(cat vr.pid) vr.log; exit \$(cat vr.code || echo 255)"
}

# The state once it has settled: a pod that is taken away may be ACTIVE for a while.
settled() {
  local now n
  for ((n = 0; n < 12; n++)); do
    now=$(state)
    [[ $now == ACTIVE ]] || break
    sleep "$POLL"
  done
  echo "$now"
}

case $verb in
  run)
    for ((try = 0; try <= RETRIES; try++)); do
      if dry_run || [[ $(state) != ACTIVE ]]; then
        queue delete --force --quiet 2>/dev/null || true # what a preemption left
        create || continue
        install
      fi
      train "$@" && exit 0 || code=$?
      dry_run && exit
      case $code in
        143 | 255) now=$(settled) ;; # told to stop; the connection broke: a pod taken away does both
        *) now=$(state) ;;
      esac
      # A run that failed, or that somebody stopped, on a pod that stands is not started again.
      if [[ $now == ACTIVE && $code != 255 ]]; then exit "$code"; fi
      echo "$NAME: $now; attempt $((try + 1)) of $RETRIES" >&2
    done
    exit 1
    ;;
  follow) on_hosts 0 'tail -n 50 -f vr.log' ;;
  status) queue describe ;;
  stop) on_hosts all 'pkill -TERM -f "^[^ ]*python[^ ]* [^ ]*vr train"' ;; # not the shell around it
  delete) queue delete --force --quiet ;;
  *)
    echo "usage: launch/tpu_vm.sh [--dry-run] run|follow|status|stop|delete ..." >&2
    exit 2
    ;;
esac
