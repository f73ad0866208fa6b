#!/usr/bin/env bash
# Two GPUs beside one of them, on one CUDA machine, in one call: expert-parallel decode, sequence-
# parallel prefill of a period, lightning layers alone, memory beside the plan, and, where --minutes
# leaves time for the two that compiling it takes, prefill with experts and time over both. A table
# comes last. On GPUs of 80 GB a period needs `-- --quantize=int8`.
#
#   bash launch/bench_pods_gpu.sh --output=results/two_gpus --minutes=9
#   bash launch/bench_pods_gpu.sh --output=results/two_gpus --only=experts --devices=4
#
#   --output=DIR    folder of the results, a folder in it for each row [bench_results/pods]
#   --minutes=N     time for all rows together; what has no time left is named and left out [9]
#   --only=A,B      only these of experts, sequence, lightning, memory, long
#   --devices=N     GPUs beside one [2]
#   --chunk=N       tokens of a prompt that each GPU reads at once [16384]
#   --model=NAME    another preset, where the period does not fit [period]
#   --dry-run       print the commands and run nothing; what is left over goes on to the next, so
#                   that the limits printed are more than --minutes together
#
# Words after -- go to `python -m mmx.bench.pods`, as in: -- --tokens=65536 --rounds=3
#
# MMX_PYTHON names a Python that has mmx; otherwise an active virtual environment is used, and
# without one .venv is made with the extra [cuda].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh
. launch/common.sh

ALL=experts,sequence,lightning,memory,long
output=bench_results/pods minutes=9 only=$ALL devices=2 chunk=16384 model=period
words=()
while [ $# -gt 0 ]; do
  word=$1
  shift
  case $word in
    --output=*) output=${word#*=} ;;
    --minutes=*) minutes=${word#*=} ;;
    --only=*) only=${word#*=} ;;
    --devices=*) devices=${word#*=} ;;
    --chunk=*) chunk=${word#*=} ;;
    --model=*) model=${word#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) usage && exit 0 ;;
    --) words=("$@") && break ;;
    *) fail "there is no flag '$word'. '--help' lists them." ;;
  esac
done
[ -n "$output" ] || fail "--output is empty. It names a folder for the results."
check --minutes "$minutes" '[1-9][0-9]{0,4}' 'it is a whole number of minutes from 1.'
row_name=${ALL//,/|}
check --only "$only" "($row_name)(,($row_name))*" "it takes names of $ALL."
check --devices "$devices" '[2-9]|[1-9][0-9]' 'it is a number of GPUs from 2.'
check --chunk "$chunk" '[1-9][0-9]{0,6}' 'it is a number of tokens.'
check --model "$model" '[a-z0-9]+' 'it is the name of a preset.'

gpu_python
if [ -z "$DRY_RUN" ]; then
  if [ "${JAX_PLATFORMS:-}" = cpu ]; then
    # Simulated devices, to try it out.
    MMX_CPU_DEVICES=$devices . launch/env.sh cpu
  else
    found=$(nvidia-smi --list-gpus | grep -c '^GPU ' || true)
    [ "$found" -ge "$devices" ] ||
      fail "--devices=$devices: nvidia-smi lists $found. Lower it, or take a larger machine."
    . launch/env.sh cuda
  fi
fi

code=0 stopped=
begin=$SECONDS
# stage NAME SHARE WORD…: a process of its own, as a peak of memory is a process's, for at most SHARE
# per cent of the time left. SECONDS_LEFT in a word becomes when it is to begin nothing more.
stage() {
  local name=$1 share=$2 left ended=0 word given=()
  shift 2
  [ -z "$stopped" ] || return 0
  case ,$only, in *,"${name%%_*}",*) ;; *) return 0 ;; esac
  left=$(((minutes * 60 - 5 - (SECONDS - begin)) * share / 100))
  if [ "$left" -lt 25 ]; then
    echo "bench_pods_gpu.sh: no time is left for $name: left out. --minutes gives more." >&2
    [ "$code" -ne 0 ] || code=1
    return 0
  fi
  for word; do given+=("${word//SECONDS_LEFT/$((left * 8 / 10))}"); done
  # Its time being up ends a row, Ctrl-C all of them; what is written is kept.
  run timeout --foreground --signal=INT --kill-after=10 "$left" "$PY" "${given[@]}" || ended=$?
  if [ "$ended" -ne 0 ]; then
    echo "bench_pods_gpu.sh: $name ended with code $ended; what it measured is kept." >&2
    [ "$code" -ne 0 ] || code=$ended
  fi
}

row() {
  local name=$1 share=$2
  stage "$name" "$share" -m mmx.bench.pods "$name" "--model=$model" "--devices=$devices" \
    "--chunk=$chunk" --seconds=SECONDS_LEFT "--output=$output/$name" ${words[@]+"${words[@]}"}
}

# memory NAME SHARE ROW [MESH]: named as in the plan that was made ahead of time.
memory() {
  stage "memory_$1" "$2" benchmarks/memory_vs_plan.py --measured_only "--geometry=$model" \
    "--rows=$3" "--mesh=${4:-}" "--output=$output/memory_$1.json"
}

# small: whether a period in bfloat16 does not fit one of these GPUs.
small() {
  [ -z "$DRY_RUN" ] && [ "${JAX_PLATFORMS:-}" != cpu ] && [ "$model" = period ] &&
    [ "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)" -lt 98304 ]
}

trap 'stopped=1 code=130' INT
# Most of a row's time is the compiler's: on 32 cores 80 s for the prompt, 10 for a decode step.
row experts 30
row sequence 55
row lightning 60
memory decode_all 35 decode:64 "expert=$devices"
if small; then
  echo "bench_pods_gpu.sh: the other rows of memory need 91 GiB a GPU: left out." >&2
else
  memory prefill_all 50 "prefill:$((chunk * devices))" "sequence=$devices"
  memory prefill_one 60 "prefill:$chunk"
  memory decode_one 95 decode:64
fi
row long 95
run "$PY" -m mmx.bench.pods_table "$output"
exit "$code"
