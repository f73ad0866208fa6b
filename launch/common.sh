# Sourced by the launchers: messages, quoting, and commands that --dry-run only shows.
# shellcheck shell=bash

if [ "${BASH_VERSINFO[0]}${BASH_VERSINFO[1]}" -lt 44 ]; then
  echo "${0##*/}: bash $BASH_VERSION is too old: 4.4 is the least. On macOS: brew install bash" >&2
  exit 2
fi
# A refusal inside $( ) ends the script too.
shopt -s inherit_errexit
DRY_RUN=
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# The comment at the head of the script.
usage() {
  awk 'NR > 1 { if (!/^#( |$)/) exit; sub(/^# ?/, ""); print }' "$0"
}

# quote WORD…: a line that the shell reads back as these words.
quote() {
  local word line=
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%,+-]+$ ]]; then
      line+=" $word"
    else
      line+=" ${word@Q}"
    fi
  done
  printf '%s' "${line# }"
}

# run COMMAND…: runs it, or prints it under --dry-run.
run() {
  if [ -n "$DRY_RUN" ]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# need TOOL WAY: refuses to go on without TOOL.
need() {
  [ -n "$DRY_RUN" ] || command -v "$1" >/dev/null 2>&1 || fail "'$1' is not installed. $2"
}

# check NAME VALUE PATTERN RULE: refuses a value of another form.
check() {
  [[ $2 =~ ^($3)$ ]] || fail "$1='$2' is not right: $4"
}

# gpu_python: PY becomes a Python that has mmx on a CUDA machine; see MMX_PYTHON of the scripts that
# measure. JAX_PLATFORMS=cpu does without the driver. Needs setup_env.sh.
gpu_python() {
  # Before anything is installed.
  [ -n "$DRY_RUN" ] || [ "${JAX_PLATFORMS:-}" = cpu ] || command -v nvidia-smi >/dev/null 2>&1 ||
    fail "there is no nvidia-smi, so no CUDA driver. JAX_PLATFORMS=cpu tries it on the CPU."
  if [ -n "${MMX_PYTHON:-}" ]; then
    PY=$MMX_PYTHON
  elif [ -n "${VIRTUAL_ENV:-}" ]; then
    PY=$VIRTUAL_ENV/bin/python
  elif [ -n "$DRY_RUN" ]; then
    PY=${VENV:-.venv}/bin/python
  else
    if [ "${JAX_PLATFORMS:-}" = cpu ]; then setup_env ""; else setup_env "[cuda]"; fi
    PY=$VENV/bin/python
  fi
  [ -z "$DRY_RUN" ] || return 0
  "$PY" -c 'import mmx' 2>/dev/null ||
    fail "$PY cannot import mmx. Install it there with: pip install -e '.[cuda]'"
}

# json WORD: a JSON string, which is YAML too.
json() {
  local text=$1
  [[ $text != *[$'\x01'-$'\x08'$'\x0b'$'\x0c'$'\x0e'-$'\x1f']* ]] ||
    fail "an argument holds a control character. Put such text into a file, and name the file."
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\r'/\\r}
  text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

# json_list WORD…
json_list() {
  local word list=
  for word; do
    list+=", $(json "$word")"
  done
  printf '[%s]' "${list#, }"
}

# platform_env PLATFORM SHARED SLICES: NAME=VALUE lines for another machine; what is set on this one
# does not count.
platform_env() {
  env -u XLA_FLAGS -u LIBTPU_INIT_ARGS -u JAX_PLATFORMS -u JAX_COMPILATION_CACHE_DIR \
    -u XLA_PYTHON_CLIENT_MEM_FRACTION -u NCCL_DEBUG -u MMX_CPU_DEVICES -u MMX_TIMEOUT_S \
    -u PYTHONUNBUFFERED \
    MMX_SHARED="$2" MMX_SLICES="$3" bash "$HERE/env.sh" "$1" --list
}

# check_verb WORD: the first word for mmx must be one of its verbs that compute.
check_verb() {
  case ${1-} in
    generate | batch | train | convert | inspect | plan) ;;
    '') fail "there is no mmx command. Write it after --, as in: -- batch --model=/mnt/mmx/model" ;;
    *) fail "mmx has no verb '$1'. After -- comes what follows 'mmx', as in: -- batch --model=DIR" ;;
  esac
}
