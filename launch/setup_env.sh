# Sourced by the launch scripts: finds a Python, makes .venv once, installs the package into it.
# PYTHON chooses the interpreter, VENV the folder. A finished install is marked, and repeated only
# when what it depends on changes.

fail() {
  printf '%s\n' "$*" >&2
  exit 2
}

usable() {
  command -v "$1" >/dev/null 2>&1 &&
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or later. Name one that is."
    return
  fi
  local name
  for name in python3 python3.13 python3.12 python3.11 python; do
    if usable "$name"; then
      PYTHON=$name
      return
    fi
  done
  fail "No Python 3.11 or later was found. Install one, or name it: PYTHON=/path/to/python bash $0"
}

# setup_env EXTRAS: "" or "[dev]".
setup_env() {
  local extras=$1 stamp wanted
  VENV=${VENV:-.venv}
  if ! usable "$VENV/bin/python"; then
    find_python
    echo "Making $VENV with $("$PYTHON" --version) …" >&2
    "$PYTHON" -m venv --clear "$VENV" ||
      fail "$PYTHON cannot make a virtual environment. On Debian: apt-get install python3-venv"
  elif [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or later. Name one that is."
    same_version "$PYTHON" "$VENV/bin/python" ||
      fail "$VENV holds another Python than PYTHON=$PYTHON. Remove it, or choose another: VENV=…"
  fi
  stamp="$VENV/installed${extras//[^a-z]/-}"
  wanted=$(cat setup.cfg pyproject.toml | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing mmx$extras into $VENV (first time: about a minute) …" >&2
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$extras" ||
      fail "pip could not install the packages; its message is above."
    printf '%s' "$wanted" >"$stamp"
  fi
}

same_version() {
  [ "$("$1" -c 'import sys; print(sys.version_info[:2])')" = \
    "$("$2" -c 'import sys; print(sys.version_info[:2])')" ]
}
