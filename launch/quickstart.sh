#!/usr/bin/env bash
# Sets up .venv and runs the embedded model. Arguments replace the default prompt:
#   bash launch/quickstart.sh --prompt="The river" --max_tokens=200
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh
setup_env ""
if [ $# -eq 0 ]; then
  set -- --prompt="Once upon a time" --max_tokens=80
fi
exec "$VENV/bin/mmx" generate --model=nano "$@"
