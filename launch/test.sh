#!/usr/bin/env bash
# Install what the tests need, and run them.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/test.sh [--quick] [PYTEST ARGUMENTS ...]

Installs the project with its test extra into the active virtual environment if there is one, else into
.venv (made if missing), and runs all tests, or those that the arguments choose.

  --quick                      leave out the files that take longest (SLOW in tests/conftest.py): what is left are unit
                               tests, one real training run, killed and continued, and the commands' errors
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
[[ "${1:-}" != "--quick" ]] || set -- -m "not slow" "${@:2}"
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
