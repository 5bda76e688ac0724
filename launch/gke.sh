#!/usr/bin/env bash
# A JobSet on GKE: TPU slices, or GPU nodes with one process each.
#
#   export NAME=vr IMAGE=REGISTRY/vr_jax:tpu
#   launch/gke.sh tpu --config F.py --workdir /mnt/W     # TPU=tpu-v5-lite-podslice TOPOLOGY=8x8
#   launch/gke.sh gpu --config F.py --workdir /mnt/W     # NODES=8 GPUS=8
#   launch/gke.sh xpk --config F.py --workdir /mnt/W     # CLUSTER=C TYPE=v5litepod-64 SLICES=1
#   launch/gke.sh follow | status | stop | delete
#
# The claim CLAIM (ReadWriteMany: Filestore, Parallelstore) is mounted at /mnt. A preempted JobSet
# starts again by itself and goes on from its last checkpoint; exit codes 2 and 3 (the input is
# wrong) end it. `stop` lets the run save.
. "$(dirname "$0")/run.sh"
[[ ${1:-} == --dry-run ]] && export DRY_RUN=1 && shift

NAME=${NAME:-vr}
SLICES=${SLICES:-1}
verb=${1:-}
[[ $# -gt 0 ]] && shift

# The arguments as items of a YAML list, which JSON strings are.
items() {
  local text
  for text in "$@"; do
    text=${text//\\/\\\\}
    printf ', "%s"' "${text//\"/\\\"}"
  done
}

jobset() { # HOSTS SLICES RESOURCES SELECTOR ENVIRONMENT ARGUMENTS...
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RETRIES:-20}
    rules:
      - {action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
    - name: host
      replicas: $2
      template:
        spec:
          parallelism: $1
          completions: $1
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - {action: FailJob, onExitCodes: {operator: In, values: [2, 3]}}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 600
              nodeSelector: {$4}
              containers:
                - name: vr
                  image: ${IMAGE:?the image, see the Dockerfiles of this folder}
                  command: [vr, train$(items "${@:6}")]
                  env: [$5]
                  resources: {limits: {$3}}
                  volumeMounts:
                    - {name: shared, mountPath: /mnt}
                    - {name: memory, mountPath: /dev/shm}
              volumes:
                - {name: shared, persistentVolumeClaim: {claimName: ${CLAIM:-shared}}}
                - {name: memory, emptyDir: {medium: Memory}}
YAML
}

start() {
  if dry_run; then
    jobset "$@"
  else
    jobset "$@" | kubectl apply -f -
  fi
}

case $verb in
  tpu)
    TOPOLOGY=${TOPOLOGY:-8x8}
    CHIPS=${CHIPS:-4} # of a host
    start $((${TOPOLOGY//x/*} / CHIPS)) "$SLICES" "google.com/tpu: $CHIPS" \
      "cloud.google.com/gke-tpu-accelerator: ${TPU:-tpu-v5-lite-podslice}, \
cloud.google.com/gke-tpu-topology: $TOPOLOGY" \
      '{name: VR_COORDINATOR, value: auto}' "$@"
    ;;
  gpu)
    NODES=${NODES:-1}
    start "$NODES" 1 "nvidia.com/gpu: ${GPUS:-8}" \
      "cloud.google.com/gke-accelerator: ${GPU:-nvidia-h100-80gb}" \
      "{name: VR_COORDINATOR, value: \"$NAME-host-0-0.$NAME:8476\"}, \
{name: VR_PROCESSES, value: \"$NODES\"}, {name: VR_PROCESS, valueFrom: {fieldRef: {fieldPath: \
\"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}}" "$@"
    ;;
  xpk)
    run xpk workload create --cluster "${CLUSTER:?the name of the xpk cluster}" --workload "$NAME" \
      --tpu-type "${TYPE:-v5litepod-64}" --num-slices "$SLICES" --max-restarts "${RETRIES:-20}" \
      --docker-image "${IMAGE:?the image, see the Dockerfiles of this folder}" \
      --command "VR_COORDINATOR=auto vr train ${*@Q}"
    ;;
  follow) run kubectl logs -f --tail 50 -l "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  status) run kubectl get jobset,pods -l "jobset.sigs.k8s.io/jobset-name=$NAME" ;;
  stop | delete) run kubectl delete jobset "$NAME" ;; # SIGTERM, then 600 s to save
  *)
    echo "usage: launch/gke.sh [--dry-run] tpu|gpu|xpk|follow|status|stop|delete ..." >&2
    exit 2
    ;;
esac
