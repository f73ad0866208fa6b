#!/usr/bin/env bash
# All of `mmx bench` on one CUDA machine, into one folder: comparison with float64, kernels, cost
# against context, prefill and decode of a period in bfloat16 and int8. A short table comes last.
#
#   bash launch/bench_gpu.sh --output=results/h200 --minutes=25
#   bash launch/bench_gpu.sh --output=results/h200 --only=kernels,decode --peers=fla,transformers
#
#   --output=DIR    folder of the results, a folder in it for each run [bench_results]
#   --minutes=N     time for all runs together; what has no time left is named and left out [25]
#   --only=A,B      only these of check, kernels, context, period, decode, period_int8, decode_int8
#   --peers=A,B     fla beside kernels, transformers beside period and decode; must be installed
#   --dry-run       print the commands and run nothing; what is left over goes on to the next, so
#                   that the limits printed are more than --minutes together
#
# MMX_PYTHON names a Python that has mmx; otherwise an active virtual environment is used, and
# without one .venv is made with the extra [cuda].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh
. launch/common.sh

ALL=check,kernels,context,period,decode,period_int8,decode_int8
output=bench_results minutes=25 only=$ALL peers=
for word; do
  case $word in
    --output=*) output=${word#*=} ;;
    --minutes=*) minutes=${word#*=} ;;
    --only=*) only=${word#*=} ;;
    --peers=*) peers=${word#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h) usage && exit 0 ;;
    *) fail "there is no flag '$word'. '--help' lists them." ;;
  esac
done
[ -n "$output" ] || fail "--output is empty. It names a folder for the results."
check --minutes "$minutes" '[1-9][0-9]{0,4}' 'it is a whole number of minutes from 1.'
run_name=${ALL//,/|}
check --only "$only" "($run_name)(,($run_name))*" "it takes names of $ALL."
check --peers "$peers" '|(fla|transformers)(,(fla|transformers))*' 'it takes fla, transformers.'

gpu_python
[ -n "$DRY_RUN" ] || . launch/env.sh cuda
# Inputs and peers take memory as they come; a row that does not fit frees its own.
run export XLA_PYTHON_CLIENT_PREALLOCATE=false

code=0
begin=$SECONDS
# stage NAME SHARE WORD…: runs `mmx bench WORD…`, for at most SHARE per cent of the time left.
stage() {
  local name=$1 share=$2 left ended=0
  shift 2
  case ,$only, in *,"$name",*) ;; *) return 0 ;; esac
  left=$(((minutes * 60 - (SECONDS - begin)) * share / 100))
  if [ "$left" -lt 20 ]; then
    echo "bench_gpu.sh: no time is left for $name: left out. --minutes gives more." >&2
    [ "$code" -ne 0 ] || code=1
    return 0
  fi
  # Ctrl-C ends a run with what it has measured.
  run timeout --foreground --signal=INT --kill-after=30 "$left" \
    "$PY" -m mmx bench "$@" "--output=$output/$name" || ended=$?
  if [ "$ended" -ne 0 ]; then
    echo "bench_gpu.sh: $name ended with code $ended$(reason "$ended")" >&2
    [ "$code" -ne 0 ] || code=$ended
  fi
}

reason() {
  case $1 in
    1) printf ': a comparison failed, or nothing could be measured.' ;;
    2) printf ': its sentence is above.' ;;
    124 | 130 | 137) printf ': its time was up; what it measured is kept.' ;;
    *) printf '.' ;;
  esac
}

kernels=() whole=()
case ,$peers, in *,fla,*) kernels+=(--peers=fla) ;; esac
case ,$peers, in *,transformers,*) whole+=(--peers=transformers) ;; esac
stage check 35 kernels --check --rounds=0
stage kernels 60 kernels ${kernels[@]+"${kernels[@]}"}
stage context 50 kernels --what=context,context_layers ${kernels[@]+"${kernels[@]}"}
stage period 50 period ${whole[@]+"${whole[@]}"}
stage decode 60 decode ${whole[@]+"${whole[@]}"}
stage period_int8 60 period --quantize=int8
stage decode_int8 100 decode --quantize=int8
run "$PY" -m mmx.bench.summary "$output"
exit "$code"
