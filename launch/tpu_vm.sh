#!/usr/bin/env bash
# Runs one mmx command on all workers of Cloud TPU VMs, which it asks for as a queued resource.
#
#   bash launch/tpu_vm.sh up --name=mmx --zone=us-east5-b --type=v6e-32 --spot --nfs=10.0.0.2:/mmx \
#     -- batch --model=/mnt/mmx/text01 --input=/mnt/mmx/in.jsonl --output=/mnt/mmx/out.jsonl
#
# up        create, wait, install, run and logs, one after the other
# create    asks for the TPU: --type, --spot, --slices, --runtime
# wait      until it is there
# install   mmx on all workers, and mounts --nfs or --bucket at --mount
# run       starts the command after -- on all workers; it goes on when this shell ends
# logs      follows worker 0, and ends with the exit code of its command
# stop      ends the command on all workers
# status    tells the state of the queued resource
# delete    gives the TPU back
#
# --name=NAME        of the queued resource and its nodes
# --zone=ZONE        where
# --project=ID       instead of gcloud's default
# --type=TYPE        accelerator type: v5litepod-64, v5p-32, v6e-32
# --runtime=VERSION  of the TPU VM; chosen by --type
# --slices=N         slices of that type, joined over the data centre's network [1]
# --spot             cheaper, and may be taken away at any time
# --restarts=N       up: ask again and resume this often after a loss [0]
# --source=WHAT      what to install: '.' packs the last commit of this repository, anything else is
#                    for pip, as in git+https://HOST/mmx@v1.0 [.]
# --nfs=HOST:/PATH   shared disk for model, input and output
# --bucket=NAME      the same by gcsfuse: for models; see launch/README.md before writing to it
# --mount=DIR        where the shared disk or bucket appears [/mnt/mmx]
# --iap              reach the workers through a tunnel, where they have no public address
# --dry-run          prints the commands, touches nothing
set -euo pipefail
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NAME='' ZONE='' PROJECT='' TYPE='' RUNTIME='' SLICES=1 SPOT='' RESTARTS=0 SOURCE=. NFS='' BUCKET=''
MOUNT=/mnt/mmx IAP='' VERB=''
COMMAND=()

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      --help) usage && exit ;;
      --name=*) NAME=${1#*=} ;;
      --zone=*) ZONE=${1#*=} ;;
      --project=*) PROJECT=${1#*=} ;;
      --type=*) TYPE=${1#*=} ;;
      --runtime=*) RUNTIME=${1#*=} ;;
      --slices=*) SLICES=${1#*=} ;;
      --spot) SPOT=1 ;;
      --restarts=*) RESTARTS=${1#*=} ;;
      --source=*) SOURCE=${1#*=} ;;
      --nfs=*) NFS=${1#*=} ;;
      --bucket=*) BUCKET=${1#*=} ;;
      --mount=*) MOUNT=${1#*=} ;;
      --iap) IAP=1 ;;
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

# The generation, as env.sh names it, and the runtime that fits.
platform() {
  case $TYPE in
    v5litepod-*) PLATFORM=v5e RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
    v5p-*) PLATFORM=v5p RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
    v6e-*) PLATFORM=v6e RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
    tpu7x*) fail "Cloud offers tpu7x through GKE alone. Use launch/gke.sh or launch/xpk.sh." ;;
    '') fail "there is no --type. Write for example --type=v6e-32." ;;
    *) fail "the type '$TYPE' is unknown. It is v5litepod-N, v5p-N or v6e-N, as in --type=v6e-32." ;;
  esac
  check --type "$TYPE" '[a-z0-9]+-[0-9]+' "it ends in a number, as in v6e-32."
}

validate() {
  case $VERB in
    up | create | wait | install | run | logs | stop | status | delete) ;;
    '') fail "there is no verb. 'launch/tpu_vm.sh --help' lists them." ;;
    *) fail "there is no verb '$VERB'. 'launch/tpu_vm.sh --help' lists them." ;;
  esac
  check --name "$NAME" '[a-z][a-z0-9-]{0,39}' "a small letter first, then letters, digits and '-'."
  check --zone "$ZONE" '[a-z0-9]+(-[a-z0-9]+)+' "a zone, as in --zone=us-east5-b."
  check --slices "$SLICES" '[1-9][0-9]*' "a number from 1."
  check --restarts "$RESTARTS" '[0-9]+' "a number from 0."
  check --mount "$MOUNT" '/[A-Za-z0-9._/-]+' "an absolute path without spaces."
  [ -z "$NFS" ] || check --nfs "$NFS" '[A-Za-z0-9._-]+:/[A-Za-z0-9._/-]*' "HOST:/PATH."
  [ -z "$BUCKET" ] || check --bucket "$BUCKET" '[a-z0-9._-]+' "a name without gs://."
  [ -z "$NFS" ] || [ -z "$BUCKET" ] || fail "--nfs and --bucket are both given. Choose one."
  case $VERB in up | create | install | run) platform ;; esac
  case $VERB in up | run) check_verb "${COMMAND[@]:0:1}" ;; esac
  need gcloud "Install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
  WHERE=("--zone=$ZONE")
  [ -z "$PROJECT" ] || WHERE+=("--project=$PROJECT")
  NODES=("$NAME")
  if [ "$SLICES" -gt 1 ]; then
    NODES=()
    local i
    for ((i = 0; i < SLICES; i++)); do NODES+=("$NAME-$i"); done
  fi
}

queued() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$NAME" "${WHERE[@]}" "$@"
}

# gcloud knows the tunnel in its alpha commands alone.
tpu_vm() {
  run gcloud ${IAP:+alpha} compute tpus tpu-vm "$@" ${IAP:+--tunnel-through-iap}
}

# on WORKERS NODE SCRIPT: runs the lines of SCRIPT there.
on() {
  tpu_vm ssh "$2" "${WHERE[@]}" --worker="$1" --command="$3"
}

# All nodes at the same time: the processes of one job wait for each other.
on_all() {
  local node pid failed=0
  local -a pids=()
  for node in "${NODES[@]}"; do
    if [ -n "$DRY_RUN" ]; then
      on all "$node" "$1"
    else
      on all "$node" "$1" &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return "$failed"
}

create() {
  local -a nodes=("--node-id=$NAME")
  [ "$SLICES" = 1 ] || nodes=("--node-count=$SLICES" "--node-prefix=$NAME")
  queued create "${nodes[@]}" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
}

state() {
  queued describe '--format=value(state.state)'
}

await() {
  if [ -n "$DRY_RUN" ]; then
    state
    echo "# … every 30 s until it says ACTIVE"
    return
  fi
  local now
  while now=$(state); do
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "tpu_vm.sh: '$NAME' is $now. Delete it, and create it anew." >&2
        return 1
        ;;
    esac
    echo "$(date +%T) $NAME: $now" >&2
    sleep 30
  done
  return 1
}

# Lines that mount the shared disk or bucket.
mount_lines() {
  [ -n "$NFS$BUCKET" ] || return 0
  echo "sudo mkdir -p $MOUNT"
  if [ -n "$NFS" ]; then
    echo 'sudo apt-get install -qq -y nfs-common'
    echo "mountpoint -q $MOUNT || sudo mount -t nfs $NFS $MOUNT"
    return
  fi
  cat <<END
if ! command -v gcsfuse; then
  sudo curl -fsSo /usr/share/keyrings/cloud.google.asc https://packages.cloud.google.com/apt/doc/apt-key.gpg
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
fi
sudo chown "\$USER" $MOUNT
mountpoint -q $MOUNT || gcsfuse --implicit-dirs $BUCKET $MOUNT
END
}

# Runs on each worker. The images' own Python may be older than mmx needs: uv brings one.
install_lines() {
  local what
  echo 'set -e'
  mount_lines
  echo 'python3 -m pip install --quiet --user uv'
  if [ "$SOURCE" = . ]; then
    echo 'rm -rf ~/mmx-source && mkdir ~/mmx-source && tar -xzf ~/mmx-source.tar.gz -C ~/mmx-source'
    # shellcheck disable=SC2016  # for the worker's shell
    what='"$HOME/mmx-source[tpu]"'
  else
    what=$(quote "mmx[tpu] @ $SOURCE")
  fi
  echo '[ -x ~/mmx-venv/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 ~/mmx-venv'
  echo "\$HOME/.local/bin/uv pip install --quiet --python ~/mmx-venv/bin/python $what"
  # jax advises it: a TPU of v5e and later starts much faster.
  echo 'sudo sh -c "echo always > /sys/kernel/mm/transparent_hugepage/enabled"'
}

install() {
  if [ "$SOURCE" = . ]; then
    local pack node
    pack=$(if [ -n "$DRY_RUN" ]; then echo /tmp/mmx-source.tar.gz; else mktemp --suffix=.tar.gz; fi)
    run git -C "$HERE/.." archive --format=tar.gz --output="$pack" HEAD || return
    for node in "${NODES[@]}"; do
      tpu_vm scp "$pack" "$node:mmx-source.tar.gz" "${WHERE[@]}" --worker=all || return
    done
    run rm -f "$pack"
  fi
  on_all "$(install_lines)"
}

# Starts the command apart from the connection; its output and exit code go to ~/mmx-run.
start() {
  local line lines
  # shellcheck disable=SC2016  # for the worker's shell
  lines='set -e; mkdir -p ~/mmx-run; cd ~/mmx-run
if [ -e pid ] && [ ! -e rc ] && kill -0 "$(cat pid)" 2>/dev/null; then
  echo "a command is running here: stop it first" >&2; exit 1
fi
rm -f rc log'
  while IFS= read -r line; do
    lines+=$'\n'"export $(quote "$line")"
  done < <(platform_env "$PLATFORM" "${NFS:+$MOUNT}${BUCKET:+$MOUNT}" "$SLICES")
  # shellcheck disable=SC2016  # for the worker's shell
  lines+=$'\n''setsid nohup bash -c '\''trap : TERM; "$@" >log 2>&1; echo $? >rc'\'' mmx '
  # shellcheck disable=SC2088
  lines+='~/mmx-venv/bin/mmx '"$(quote "${COMMAND[@]}")"' </dev/null >/dev/null 2>&1 & echo $! >pid'
  on_all "$lines"
}

logs() {
  # shellcheck disable=SC2016  # for the worker's shell
  on 0 "${NODES[0]}" \
    'cd ~/mmx-run && tail -n +1 --pid="$(cat pid)" -F log; exit "$(cat rc 2>/dev/null || echo 143)"'
}

up() {
  local code restarts=0
  create
  while :; do
    code=0
    { await && install && start && logs; } || code=$?
    # 2 is a mistake in the command: it would be made again.
    if [ "$code" = 0 ] || [ "$code" = 2 ] || [ "$restarts" -ge "$RESTARTS" ]; then return "$code"; fi
    restarts=$((restarts + 1))
    echo "tpu_vm.sh: ended with $code; start $restarts of $RESTARTS more" >&2
    if [ "$(state)" != ACTIVE ]; then
      queued delete --force --quiet
      create
    else
      stop || true
    fi
  done
}

stop() {
  # shellcheck disable=SC2016  # for the worker's shell
  on_all 'cd ~/mmx-run && kill -TERM -- "-$(cat pid)"'
}

parse "$@"
validate
case $VERB in
  wait) await ;;
  run) start ;;
  status) state ;;
  delete) queued delete --force --quiet ;;
  *) "$VERB" ;;
esac
