#!/usr/bin/env bash
# Install what the tests need, and run them.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/test.sh [--quick] [PYTEST ARGUMENTS ...]

Installs the project with its test dependencies into the active virtual environment, or into .venv (created if it does
not exist), and runs all tests, or those that the arguments select.

  --quick                      leave out the slowest test files (SLOW in tests/conftest.py)
  PYTHON=/path/to/python3.12   Python to create .venv with (>= 3.11; default: the first of python3.12, python3.11, python3)
  VISIONFM_VENV=DIR            virtual environment to use or create instead
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
