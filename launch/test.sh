#!/usr/bin/env bash
# Install what the tests need, and run them.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/test.sh [PYTEST ARGUMENTS ...]

Installs the project with its test extra into the active virtual environment if there is one, else into
.venv (made if missing), and runs all tests, or those that the arguments choose.

  PYTHON=/path/to/python3.12   the Python to make .venv with (>= 3.11; else the newest that is found)
  VISIONFM_VENV=DIR            use or make this virtual environment instead
TEXT
}
[[ "${1:-}" != "--help" && "${1:-}" != "-h" ]] || { usage; exit 0; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
venv=${VISIONFM_VENV:-${VIRTUAL_ENV:-.venv}}
ensure_installed "$venv" "[test]"
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
