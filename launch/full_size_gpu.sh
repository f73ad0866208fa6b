#!/usr/bin/env bash
# The whole text01 model with random weights on all GPUs of one host, in bfloat16 and in int8:
# prefill, decode, the largest context, memory beside the plan, and time in collectives.
#
#   bash launch/full_size_gpu.sh --output=benchmarks/full_size --minutes=9
#   bash launch/full_size_gpu.sh --output=results/half --only=int8 --mesh=expert=2,tensor=4
#
#   --output=DIR    folder of the results, a folder in it for each run [bench_results/full_size]
#   --minutes=N     time for both runs; what has no time left is named and left out [9]
#   --only=A,B      only these of bf16, int8
#   --mesh=AXES     as in tensor=8; as `mmx plan` would choose if left out
#   --layers=N      the first layers only, 0 for all; if left out, 16 on fewer than 8 GPUs
#   --model=NAME    another preset [text01]
#   --long=N        tokens of a prompt that int8 reads and continues, 0 for none [1048576]
#   --dry-run       print the commands and run nothing
#
# MMX_PYTHON names a Python that has mmx; otherwise an active virtual environment is used, and
# without one .venv is made with the extra [cuda].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh
. launch/common.sh

output=bench_results/full_size minutes=9 only=bf16,int8 mesh='' layers='' model=text01 long=1048576
for word; do
  case $word in
    --output=*) output=${word#*=} ;;
    --minutes=*) minutes=${word#*=} ;;
    --only=*) only=${word#*=} ;;
    --mesh=*) mesh=${word#*=} ;;
    --layers=*) layers=${word#*=} ;;
    --model=*) model=${word#*=} ;;
    --long=*) long=${word#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) usage && exit 0 ;;
    *) fail "there is no flag '$word'. '--help' lists them." ;;
  esac
done
[ -n "$output" ] || fail "--output is empty. It names a folder for the results."
check --minutes "$minutes" '[1-9][0-9]{0,4}' 'it is a whole number of minutes from 1.'
check --only "$only" '(bf16|int8)(,(bf16|int8))*' 'it takes names of bf16,int8.'
check --mesh "$mesh" '|[a-z]+=[0-9]+(,[a-z]+=[0-9]+)*' 'it is like expert=2,tensor=4.'
check --layers "$layers" '[0-9]{0,3}' 'it is a whole number.'
check --model "$model" '[a-z0-9]+' 'it is the name of a preset.'
check --long "$long" '[0-9]{1,8}' 'it is a number of tokens.'

gpu_python
if [ -z "$DRY_RUN" ]; then
  if [ "${JAX_PLATFORMS:-}" = cpu ]; then . launch/env.sh cpu; else . launch/env.sh cuda; fi
fi

words=("--model=$model")
[ -z "$mesh" ] || words+=("--mesh=$mesh")
[ -z "$layers" ] || words+=("--layers=$layers")
code=0
begin=$SECONDS
# stage NAME SHARE WORD…: a process of its own, as a peak of memory is a process's, for at most
# SHARE per cent of the time left.
stage() {
  local name=$1 share=$2 left ended=0
  shift 2
  case ,$only, in *,"$name",*) ;; *) return 0 ;; esac
  [ "$only" != "$name" ] || share=100
  left=$(((minutes * 60 - (SECONDS - begin)) * share / 100))
  if [ "$left" -lt 30 ]; then
    echo "full_size_gpu.sh: no time is left for $name: left out. --minutes gives more." >&2
    [ "$code" -ne 0 ] || code=1
    return 0
  fi
  # The rows end by themselves somewhat earlier; what is written is kept if they do not.
  run timeout --foreground --signal=INT --kill-after=10 "$left" \
    "$PY" -m mmx.bench.full_size "${words[@]}" "--seconds=$((left * 9 / 10))" "$@" \
    "--output=$output/$name" || ended=$?
  if [ "$ended" -ne 0 ]; then
    echo "full_size_gpu.sh: $name ended with code $ended; what it measured is kept." >&2
    [ "$code" -ne 0 ] || code=$ended
  fi
}

stage bf16 45
stage int8 95 --quantize=int8 "--long=$long"
exit "$code"
