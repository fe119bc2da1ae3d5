#!/usr/bin/env bash
# Functions for the other scripts: a Python, a virtual environment, and the project in it. Sourced, not run.
[[ "${BASH_SOURCE[0]}" != "$0" ]] || {
    set -euo pipefail
    echo "launch/venv.sh only holds functions; run launch/quickstart.sh or launch/test.sh"
    exit 0
}

# Print a Python >= 3.11: $PYTHON if set, else the first that runs of python3.12, python3.11, python3.
# Each is asked for its version by running it: a shim on the PATH may stand for nothing.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: ${PYTHON:-no python3.12, python3.11 or python3 on the PATH} is not a Python >= 3.11;" \
        "install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
    return 2
}

# ensure_installed VENV EXTRAS: the project, editable, in VENV (made if missing). EXTRAS is "" or "[test]".
# A stamp with the hash of pyproject.toml is written last: a second run installs nothing, an interrupted one again.
ensure_installed() {
    local venv=$1 extras=$2 hash python
    if [[ ! -x "$venv/bin/python" ]]; then
        python=$(find_python)
        echo "making $venv with $python"
        if ! "$python" -m venv "$venv"; then
            echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
            return 2
        fi
    fi
    hash=$("$venv/bin/python" -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')
    local stamp="$venv/.visionfm_jax$extras"
    if [[ ! -f "$stamp" || "$(<"$stamp")" != "$hash $PWD" ]]; then
        echo "installing visionfm_jax$extras into $venv (a few minutes the first time)"
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip # uv's have no pip
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$extras"
        echo "$hash $PWD" >"$stamp"
    fi
}
