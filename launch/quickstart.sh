#!/usr/bin/env bash
# Sets up .venv and runs the embedded model. Arguments replace the default prompt:
#   bash launch/quickstart.sh --prompt="A database index is" --max_tokens=200
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh
setup_env ""
if [ $# -eq 0 ]; then
  set -- --prompt="To install the program, you" --max_tokens=80 --temperature=0.7 --top_p=0.9 --seed=1
fi
exec "$VENV/bin/mmx" generate --model=nano "$@"
