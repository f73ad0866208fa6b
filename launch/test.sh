#!/usr/bin/env bash
# Sets up .venv with the test tools and runs the default suite. Arguments go to pytest:
#   bash launch/test.sh -k batch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh
setup_env "[dev]"
exec "$VENV/bin/python" -m pytest -n "${JOBS:-2}" -q "$@"
