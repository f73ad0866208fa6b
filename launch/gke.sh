#!/usr/bin/env bash
# Runs one mmx command on GKE as a JobSet: TPU slices or GPU hosts, from launch/gke_jobset.yaml.
#
#   bash launch/gke.sh apply --name=mmx --pod=v6e:4x8 --image=REGISTRY/mmx:tpu --claim=shared:/mnt/mmx \
#     -- batch --model=/mnt/mmx/text01 --input=/mnt/mmx/in.jsonl --output=/mnt/mmx/out.jsonl
#
# apply     starts it
# logs      follows the first host
# status    tells how far it is
# delete    ends it
#
# --name=NAME            of the JobSet
# --pod=POD              as for `mmx plan`: v6e:4x8, v5p:2x2x4, 2*v6e:16x16 (slices), h200:2x8
# --image=IMAGE          built from launch/docker, with a tag
# --claim=NAME:DIR       a PersistentVolumeClaim (Filestore, NFS) that appears at DIR
# --bucket=NAME:DIR      a bucket that appears at DIR, by the Cloud Storage FUSE driver: for models
# --shared=DIR           where compiled programs are kept [the claim's DIR]
# --service-account=NAME of Kubernetes, with the right to read the bucket [default]
# --namespace=NAME       [kubectl's]
# --spot                 on spot nodes
# --max-restarts=N       after lost hosts [20]
# --chips-per-host=N     where a slice of v5e or v6e is built of other hosts than the usual
# --privileged           as root with all rights, for TPU nodes older than GKE 1.28
# --dry-run              prints the manifest, touches nothing
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NAME='' POD='' IMAGE='' CLAIM='' BUCKET='' SHARED='' ACCOUNT=default NAMESPACE='' SPOT='' RESTARTS=20
CHIPS_PER_HOST='' PRIVILEGED='' VERB=''
COMMAND=()

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      --help) usage && exit ;;
      --name=*) NAME=${1#*=} ;;
      --pod=*) POD=${1#*=} ;;
      --image=*) IMAGE=${1#*=} ;;
      --claim=*) CLAIM=${1#*=} ;;
      --bucket=*) BUCKET=${1#*=} ;;
      --shared=*) SHARED=${1#*=} ;;
      --service-account=*) ACCOUNT=${1#*=} ;;
      --namespace=*) NAMESPACE=${1#*=} ;;
      --spot) SPOT=1 ;;
      --max-restarts=*) RESTARTS=${1#*=} ;;
      --chips-per-host=*) CHIPS_PER_HOST=${1#*=} ;;
      --privileged) PRIVILEGED=1 ;;
      --dry-run) DRY_RUN=1 ;;
      --) shift && COMMAND=("$@") && break ;;
      -*) fail "there is no flag '$1'. See --help; values are joined by '=', as in --name=mmx." ;;
      *)
        [ -z "$VERB" ] || fail "'$VERB' and '$1': one verb at a time. mmx's own words come after --."
        VERB=$1
        ;;
    esac
    shift
  done
}

validate() {
  local dns='[a-z]([a-z0-9-]{0,38}[a-z0-9])?' name="small letters, digits and '-', a letter first."
  case $VERB in
    apply | logs | status | delete) ;;
    '') fail "there is no verb. It is apply, logs, status or delete." ;;
    *) fail "there is no verb '$VERB'. It is apply, logs, status or delete." ;;
  esac
  check --name "$NAME" "$dns" "$name"
  [ -z "$NAMESPACE" ] || check --namespace "$NAMESPACE" "$dns" "$name"
  need kubectl "Install it: gcloud components install kubectl"
  [ "$VERB" = apply ] || return 0
  check --image "$IMAGE" '[^ ]+(:[A-Za-z0-9_.-]+|@sha256:[0-9a-f]{64})' \
    "an image with a tag or digest, as in --image=REGISTRY/mmx:tpu."
  check --service-account "$ACCOUNT" "$dns" "$name"
  check --max-restarts "$RESTARTS" '[0-9]+' "a number from 0."
  [ -z "$CLAIM" ] || check --claim "$CLAIM" '[a-z0-9.-]+:/[A-Za-z0-9._/-]+' "NAME:/DIR."
  [ -z "$BUCKET" ] || check --bucket "$BUCKET" '[a-z0-9._-]+:/[A-Za-z0-9._/-]+' "NAME:/DIR."
  [ -z "$CHIPS_PER_HOST" ] || check --chips-per-host "$CHIPS_PER_HOST" '1|4|8' "1, 4 or 8."
  check_verb "${COMMAND[@]:0:1}"
  [ -n "$SHARED" ] || SHARED=${CLAIM#*:}
}

# Sets SLICES, HOSTS, CHIPS (of one host), KIND (platform of env.sh) and the node selector.
read_pod() {
  local rest=$POD chip shape size total=1 sides
  check --pod "$POD" '([1-9][0-9]*\*)?[a-z0-9]+:[1-9][0-9]*(x[1-9][0-9]*)*' \
    "CHIP:TOPOLOGY, as in v6e:4x8, v5p:2x2x4 or h200:2x8 (hosts x GPUs)."
  SLICES=1
  [[ $rest != *'*'* ]] || SLICES=${rest%%'*'*} rest=${rest#*'*'}
  chip=${rest%%:*} shape=${rest#*:}
  for size in ${shape//x/ }; do total=$((total * size)); done
  KIND=$chip
  case $chip in
    v5e) ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p) ACCELERATOR=tpu-v5p-slice ;;
    v6e) ACCELERATOR=tpu-v6e-slice ;;
    tpu7x) ACCELERATOR=tpu7x ;;
    h200)
      KIND=cuda ACCELERATOR=nvidia-h200-141gb
      check --pod "$POD" 'h200:[1-9][0-9]*x[1-8]' "h200:HOSTSxGPUS, with at most 8 GPUs in a host."
      HOSTS=${shape%x*} CHIPS=${shape#*x}
      return
      ;;
    *) fail "--pod='$POD': the chip '$chip' is unknown. It is v5e, v5p, v6e, tpu7x or h200." ;;
  esac
  case $chip:$shape in
    v5e:?x? | v5e:?x?? | v5e:??x?? | v6e:?x? | v6e:?x?? | v6e:??x??) ;;
    v5p:*x*x*x* | tpu7x:*x*x*x*) fail "--pod='$POD': v5p and tpu7x lie in three dimensions (2x2x4)." ;;
    v5p:*x*x* | tpu7x:*x*x*) ;;
    *) fail "--pod='$POD': v5e and v6e lie in two dimensions (4x8), v5p and tpu7x in three (2x2x4)." ;;
  esac
  # As `mmx plan` has it: hosts are squares of 2x2 chips.
  case $shape in
    1x1 | 1x1x1) ;;
    *)
      IFS=x read -ra sides <<<"$shape"
      for size in "${sides[@]:0:2}"; do
        [ $((size % 2)) = 0 ] ||
          fail "--pod='$POD' is no whole number of hosts, which hold 2x2 chips: its first sides are even."
      done
      ;;
  esac
  # Hosts of several-host slices hold 4 chips; one host alone may hold 1 or 8.
  CHIPS=4
  case $chip:$shape in
    *:1x1 | *:1x1x1) CHIPS=1 ;;
    v5e:2x4 | v6e:2x4) CHIPS=8 ;;
  esac
  CHIPS=${CHIPS_PER_HOST:-$CHIPS}
  [ $((total % CHIPS)) = 0 ] || fail "--pod='$POD': $total chips are no whole number of hosts of $CHIPS."
  HOSTS=$((total / CHIPS))
  TOPOLOGY=$shape
}

environment() {
  local line list=''
  while IFS= read -r line; do
    list+="{\"name\": $(json "${line%%=*}"), \"value\": $(json "${line#*=}")}, "
  done < <(platform_env "$KIND" "$SHARED" "$SLICES")
  # GKE tells TPU pods of each other; GPU pods are told here.
  if [ "$KIND" = cuda ] && [ "$HOSTS" -gt 1 ]; then
    list+="{\"name\": \"MMX_COORDINATOR\", \"value\": \"$NAME-slice-0-0.$NAME:8476\"}, "
    list+="{\"name\": \"MMX_PROCESSES\", \"value\": \"$HOSTS\"}, "
    list+='{"name": "MMX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": '
    list+="\"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}}, "
  fi
  printf '[%s]' "${list%, }"
}

# Sets FILL[PLACEHOLDER] to YAML.
fill() {
  local mounts='' volumes='' tolerations='' selector
  declare -gA FILL
  if [ -n "$CLAIM" ]; then
    volumes+="{name: claim, persistentVolumeClaim: {claimName: $(json "${CLAIM%%:*}")}}, "
    mounts+="{name: claim, mountPath: $(json "${CLAIM#*:}")}, "
  fi
  if [ -n "$BUCKET" ]; then
    volumes+="{name: bucket, csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: "
    volumes+="{bucketName: $(json "${BUCKET%%:*}"), mountOptions: 'implicit-dirs,uid=1000,gid=1000'}}}, "
    mounts+="{name: bucket, mountPath: $(json "${BUCKET#*:}")}, "
  fi
  FILL[ANNOTATIONS]='{}'
  if [ "$KIND" = cuda ]; then
    selector="cloud.google.com/gke-accelerator: $ACCELERATOR"
    FILL[LIMITS]="{nvidia.com/gpu: $CHIPS}"
    tolerations+='{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}, '
    # NCCL talks within a host through shared memory; the default of 64 MiB is too little.
    volumes+='{name: shm, emptyDir: {medium: Memory}}, '
    mounts+='{name: shm, mountPath: /dev/shm}, '
  else
    selector="cloud.google.com/gke-tpu-accelerator: $ACCELERATOR, "
    selector+="cloud.google.com/gke-tpu-topology: $(json "$TOPOLOGY")"
    FILL[LIMITS]="{google.com/tpu: $CHIPS}"
    # A slice is one node pool: two jobs must not share one.
    FILL[ANNOTATIONS]='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
  fi
  if [ -n "$SPOT" ]; then
    selector+=', cloud.google.com/gke-spot: "true"'
    tolerations+='{key: cloud.google.com/gke-spot, operator: Equal, value: "true", '
    tolerations+='effect: NoSchedule}, '
  fi
  FILL[NODE_SELECTOR]="{$selector}" FILL[TOLERATIONS]="[${tolerations%, }]"
  FILL[POD_ANNOTATIONS]=$([ -n "$BUCKET" ] && echo '{gke-gcsfuse/volumes: "true"}' || echo '{}')
  FILL[POD_SECURITY]='{runAsNonRoot: true, runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000}'
  FILL[SECURITY]='{allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}'
  if [ -n "$PRIVILEGED" ]; then
    FILL[POD_SECURITY]='{runAsUser: 0}' FILL[SECURITY]='{privileged: true}'
  fi
  FILL[NAME]=$(json "$NAME") FILL[IMAGE]=$(json "$IMAGE") FILL[SERVICE_ACCOUNT]=$(json "$ACCOUNT")
  FILL[MAX_RESTARTS]=$RESTARTS FILL[SLICES]=$SLICES FILL[HOSTS]=$HOSTS
  # Kubernetes would read $(NAME) as a variable; a doubled $ is one.
  FILL[ARGS]=$(json_list "${COMMAND[@]//'$'/'$$'}")
  FILL[ENV]=$(environment)
  FILL[MOUNTS]="[${mounts%, }]" FILL[VOLUMES]="[${volumes%, }]"
}

# One placeholder a line; what is filled in is not looked at again.
manifest() {
  local line
  while IFS= read -r line; do
    if [[ $line =~ ^([^#]*)@([A-Z_]+)@$ ]]; then
      line=${BASH_REMATCH[1]}${FILL[${BASH_REMATCH[2]}]}
    fi
    printf '%s\n' "$line"
  done <"$HERE/gke_jobset.yaml"
}

kube() {
  run kubectl ${NAMESPACE:+--namespace="$NAMESPACE"} "$@"
}

parse "$@"
validate
case $VERB in
  apply)
    read_pod
    fill
    if [ -n "$DRY_RUN" ]; then
      echo "# $(kube apply -f -), with on its stdin:"
      manifest
    else
      manifest | kube apply -f -
    fi
    ;;
  logs) kube logs --follow "job/$NAME-slice-0" --container=mmx ;;
  status) kube get jobset,pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" ;;
  delete) kube delete jobset "$NAME" ;;
esac
