#!/usr/bin/env bash
# From a fresh clone to a trained model: environment, install, configs/quickstart.py.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/quickstart.sh [--config.FIELD=VALUE ...]

Makes .venv if there is none, installs the project into it, trains configs/quickstart.py on the bundled
scans and evaluates. The run folder is runs/quickstart (--config.workdir=DIR for another).

  PYTHON=/path/to/python3.12   the Python to make .venv with (>= 3.11; else the newest that is found)
  VISIONFM_VENV=DIR            use or make this virtual environment instead of .venv
TEXT
}
[[ "${1:-}" != "--help" && "${1:-}" != "-h" ]] || { usage; exit 0; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
venv=${VISIONFM_VENV:-.venv}
ensure_installed "$venv" ""
exec "$venv/bin/python" -m visionfm_jax.main --config=configs/quickstart.py "$@"
