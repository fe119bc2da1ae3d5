#!/usr/bin/env bash
# From a fresh clone to a trained model: environment, install, configs/quickstart.py.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/quickstart.sh [--config.FIELD=VALUE ...]

Creates .venv if it does not exist, installs the project into it, and trains and evaluates configs/quickstart.py on the
bundled scans of digits. The run folder is runs/quickstart (--config.workdir=DIR for another).

  PYTHON=/path/to/python3.12   Python to create .venv with (>= 3.11; default: the first of python3.12, python3.11, python3)
  VISIONFM_VENV=DIR            virtual environment to use or create instead of .venv
TEXT
}
[[ "${1:-}" != "--help" && "${1:-}" != "-h" ]] || { usage; exit 0; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
venv=${VISIONFM_VENV:-.venv}
ensure_installed "$venv" ""
exec "$venv/bin/python" -m visionfm_jax.main --config=configs/quickstart.py "$@"
