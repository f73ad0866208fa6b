#!/usr/bin/env bash
# A pod in a box: N real processes of one command on this machine, joined over loopback.
#   bash launch/local_pod.sh 4 --devices=2 -- mmx batch --input=in.jsonl --output=out.jsonl
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/local_pod.sh N [--devices=D] [--port=P] [--grace=S] [--dry-run] -- COMMAND …

Starts COMMAND in N processes on this machine, as on a pod of N hosts: the same command line, joined
over 127.0.0.1, each with D simulated CPU devices. Every line is marked with its process. When one
fails the others get S seconds to end by themselves and are then stopped; the exit code is that of
the first failure.

  N            processes
  --devices=D  simulated CPU devices of each; without it, the devices that the machine has
  --port=P     port of process 0 (a free one)
  --grace=S    seconds between the first failure and stopping the rest [15]
  --dry-run    print what would be started

example:
  bash launch/local_pod.sh 4 --devices=2 -- mmx batch --input=in.jsonl --output=out.jsonl
TEXT
}

refuse() {
  printf 'local_pod.sh: %s\n' "$*" >&2
  exit 2
}

whole() {
  case $2 in
    '' | *[!0-9]* | 0*) refuse "$1=$2 is out of range. It is a whole number from 1." ;;
  esac
}

processes='' devices='' port='' grace=15 dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --devices=*) devices=${1#*=} && whole --devices "$devices" ;;
    --port=*) port=${1#*=} && whole --port "$port" ;;
    --grace=*) grace=${1#*=} && whole --grace "$grace" ;;
    --dry-run) dry=1 ;;
    --) shift && break ;;
    -*) refuse "There is no flag '$1'. '--help' lists them; the command stands after '--'." ;;
    *)
      [ -z "$processes" ] || refuse "'$1' is not expected here. The command stands after '--'."
      processes=$1 && whole N "$processes"
      ;;
  esac
  shift
done
[ -n "$processes" ] || refuse "There is no number of processes. '--help' shows an example."
[ $# -gt 0 ] || refuse "There is no command. It stands after '--'."

# The environment that quickstart.sh makes, where none is active.
if ! command -v mmx >/dev/null 2>&1; then
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  PATH=$PATH:$here/.venv/bin
fi

taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

if [ -z "$port" ]; then
  port=$((20000 + RANDOM % 20000))
  while taken "$port"; do port=$((20000 + RANDOM % 20000)); done
fi

settings=("MMX_COORDINATOR=127.0.0.1:$port" "MMX_PROCESSES=$processes")
if [ -n "$devices" ]; then
  flag=--xla_force_host_platform_device_count=$devices
  settings+=("JAX_PLATFORMS=cpu" "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$flag")
fi

if [ -n "$dry" ]; then
  for ((i = 0; i < processes; i++)); do
    printf 'env'
    printf ' %q' "${settings[@]}" "MMX_PROCESS_ID=$i" "$@"
    printf '\n'
  done
  exit 0
fi

# Marks lines, and outlives the process that it marks.
mark() {
  trap '' INT TERM
  exec sed -u "s/^/[$1] /"
}

# Runs process $1; its exit code goes to descriptor 3, also when a signal reaches the whole group.
run() {
  local i=$1 code=0
  shift
  {
    {
      trap : INT TERM
      env "${settings[@]}" "MMX_PROCESS_ID=$i" "$@" 2>&1 1>&5 3>&- 4>&- 5>&- || code=$?
      echo "$i $code" >&3
    } | mark "$i" >&4
  } 5>&1 | mark "$i"
}

pids=()
stop() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill -"$1" -- "-$pid" 2>/dev/null || true; done
}

pipe=$(mktemp -u)
mkfifo "$pipe"
exec 3<>"$pipe" 4>&2
rm "$pipe"
deadline=''
trap 'stop KILL' EXIT
trap 'stop INT; deadline=$((SECONDS + grace))' INT
trap 'stop TERM; deadline=$((SECONDS + grace))' TERM

# Each is a group of its own, so that what it started ends with it. The shell's own word on a
# killed process is left out.
set -m
for ((i = 0; i < processes; i++)); do
  run "$i" "$@" 2>/dev/null &
  pids+=($!)
done
set +m

first=0
left=$processes
while [ "$left" -gt 0 ]; do
  ended=''
  if [ -z "$deadline" ]; then
    read -r ended code <&3 || true
  elif [ "$SECONDS" -lt "$deadline" ]; then
    read -r -t "$((deadline - SECONDS))" ended code <&3 || true
  else
    printf 'local_pod.sh: stopping what still runs\n' >&2
    stop TERM
    sleep 3
    stop KILL
    [ "$first" -ne 0 ] || first=143
    break
  fi
  [ -n "$ended" ] || continue # a signal came, or the time is up
  left=$((left - 1))
  if [ "$code" -ne 0 ]; then
    printf '[%s] ended with code %s\n' "$ended" "$code" >&2
    if [ "$first" -eq 0 ]; then
      first=$code
      deadline=$((SECONDS + grace))
    fi
  fi
done
wait
exit "$first"
