#!/usr/bin/env bash
# Runs one mmx command as an xpk workload, where a cluster was made by xpk.
#
#   bash launch/xpk.sh create --cluster=tpus --zone=us-east5-b --name=mmx --type=v6e-32 \
#     --image=REGISTRY/mmx:tpu --storage=shared -- train --gin_file=/mnt/mmx/run.gin --run=/mnt/mmx/run
#
# create    starts it
# list      tells how far it is
# delete    ends it
#
# --cluster=NAME      of xpk
# --zone=ZONE         of the cluster
# --project=ID        instead of gcloud's default
# --name=NAME         of the workload
# --type=TYPE         v5litepod-64, v5p-32, v6e-32, tpu7x-16; for GPUs use launch/gke.sh
# --slices=N          slices of that type [1]
# --image=IMAGE       built from launch/docker, with a tag
# --storage=NAME      attached before by `xpk storage attach`; may be repeated
# --shared=DIR        where compiled programs are kept: a folder of that storage
# --spot              on spot capacity that xpk provisions
# --priority=LEVEL    very-low, low, medium, high or very-high [medium]
# --max-restarts=N    after lost hosts [20]
# --dry-run           prints the command, touches nothing
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CLUSTER='' ZONE='' PROJECT='' NAME='' TYPE='' SLICES=1 IMAGE='' SHARED='' SPOT='' PRIORITY=medium
RESTARTS=20 VERB=''
STORAGE=() COMMAND=()

while [ $# -gt 0 ]; do
  case $1 in
    --help) usage && exit ;;
    --cluster=*) CLUSTER=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --name=*) NAME=${1#*=} ;;
    --type=*) TYPE=${1#*=} ;;
    --slices=*) SLICES=${1#*=} ;;
    --image=*) IMAGE=${1#*=} ;;
    --storage=*) STORAGE+=("${1#*=}") ;;
    --shared=*) SHARED=${1#*=} ;;
    --spot) SPOT=1 ;;
    --priority=*) PRIORITY=${1#*=} ;;
    --max-restarts=*) RESTARTS=${1#*=} ;;
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

name="small letters, digits and '-', a letter first."
case $VERB in
  create | list | delete) ;;
  '') fail "there is no verb. It is create, list or delete." ;;
  *) fail "there is no verb '$VERB'. It is create, list or delete." ;;
esac
check --cluster "$CLUSTER" '[a-z][a-z0-9-]*' "$name"
check --zone "$ZONE" '[a-z0-9]+(-[a-z0-9]+)+' "a zone, as in --zone=us-east5-b."
[ "$VERB" = list ] || check --name "$NAME" '[a-z][a-z0-9-]{0,38}' "$name"
need xpk "Install it: pip install xpk"
xpk=(xpk workload "$VERB" --cluster="$CLUSTER" --zone="$ZONE")
[ -z "$PROJECT" ] || xpk+=(--project="$PROJECT")
if [ "$VERB" != create ]; then
  [ "$VERB" = list ] || xpk+=(--workload="$NAME")
  run "${xpk[@]}"
  exit
fi

case $TYPE in
  v5litepod-*) kind=v5e ;;
  v5p-* | v6e-* | tpu7x-*) kind=${TYPE%%-*} ;;
  *) fail "the type '$TYPE' is unknown. It is v5litepod-N, v5p-N, v6e-N or tpu7x-N." ;;
esac
check --slices "$SLICES" '[1-9][0-9]*' "a number from 1."
check --max-restarts "$RESTARTS" '[0-9]+' "a number from 0."
check --priority "$PRIORITY" 'very-low|low|medium|high|very-high' \
  "it is very-low, low, medium, high or very-high."
check --image "$IMAGE" '[^ ]+:[A-Za-z0-9_.-]+' "an image with a tag, as in --image=REGISTRY/mmx:tpu."
check_verb "${COMMAND[@]:0:1}"

xpk+=(--tpu-type="$TYPE" --num-slices="$SLICES")
xpk+=(--workload="$NAME" --docker-image="$IMAGE" --priority="$PRIORITY" --max-restarts="$RESTARTS")
for storage in "${STORAGE[@]}"; do xpk+=(--storage="$storage"); done
[ -z "$SPOT" ] || xpk+=(--spot)
while IFS= read -r line; do
  xpk+=(--env="$line")
done < <(platform_env "$kind" "$SHARED" "$SLICES")
# xpk hands the command to a shell in the container.
run "${xpk[@]}" --command="$(quote mmx "${COMMAND[@]}")"
