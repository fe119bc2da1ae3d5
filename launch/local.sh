#!/usr/bin/env bash
# Several processes of one run on this machine.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/local.sh N [ARGUMENTS ...]          N x python -m visionfm_jax.main ARGUMENTS
       launch/local.sh N -- COMMAND [ARGS ...]    N x COMMAND, with the same variables

Starts N processes of one run on this machine, connected through a free port. If nvidia-smi shows GPUs, each process
gets one (the first N of CUDA_VISIBLE_DEVICES if that is set; empty means CPU). If one process fails, all are ended, and
the exit code is that of the first failure. Ctrl-C and SIGTERM are passed on to all. If this script itself is killed,
the processes are asked to save and end, and are killed after two minutes.

  PYTHON=/path/to/python   Python to run (default: of the active environment, of .venv, or python3)
TEXT
}
[[ "${1:-}" != "--help" && "${1:-}" != "-h" ]] || { usage; exit 0; }
if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the first argument is the number of processes, not '${1:-}'; see launch/local.sh --help" >&2
    exit 2
fi
count=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ ! -x "$root/.venv/bin/python" ]] || PYTHON=$root/.venv/bin/python
    [[ -z "${VIRTUAL_ENV:-}" ]] || PYTHON=$VIRTUAL_ENV/bin/python
fi
if [[ "${1:-}" == "--" ]]; then
    shift
    command=("$@")
else
    cd "$root"
    command=("$PYTHON" -m visionfm_jax.main "$@")
fi

gpus=()
if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null && listed=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null); then
    read -r -a gpus <<<"${listed//$'\n'/ }"
fi
if ((${#gpus[@]} > 0)); then
    if ((count > ${#gpus[@]})); then
        echo "error: $count processes, but ${#gpus[@]} GPUs (${gpus[*]}); start fewer, or CUDA_VISIBLE_DEVICES= for the CPU" >&2
        exit 2
    fi
    # shellcheck source=launch/env.sh
    source "$root/launch/env.sh"
fi

port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export VISIONFM_COORDINATOR=127.0.0.1:$port VISIONFM_PROCESSES=$count

# What ends the processes when SIGKILL ends this script: it reads their numbers, and goes on when nobody holds the
# other end of its pipe any more, unless the last line said that all is done.
end_orphans() {
    local pid pids=()
    while read -r pid; do
        [[ "$pid" != done ]] || exit 0
        pids+=("$pid")
    done
    kill -s TERM "${pids[@]}" 2>/dev/null || true
    for ((second = 0; second < 120; second++)); do
        kill -0 "${pids[@]}" 2>/dev/null || break # fails when none is left
        sleep 1
    done
    for pid in "${pids[@]}"; do kill -s KILL -- "-$pid" 2>/dev/null || true; done
}

# Job control: each process leads its own group. Otherwise bash would start them with SIGINT ignored, and a
# Ctrl-C on the terminal would reach them past this script.
set -m
coproc end_orphans >/dev/null 2>&1
pids=()
for ((i = 0; i < count; i++)); do
    ((${#gpus[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${gpus[i]}
    VISIONFM_PROCESS=$i "${command[@]}" </dev/null &
    pids+=($!)
    echo $! >&"${COPROC[1]}"
done
set +m # what this script itself runs stays in its group, so that Ctrl-C interrupts it

signalled=""
# All workers of a process are in its group, but only the process itself decides how to end them.
# shellcheck disable=SC2317 # called by the traps
forward() {
    signalled=$1
    kill -s "$1" "${pids[@]}" 2>/dev/null || true
}
trap 'forward INT' INT
trap 'forward TERM' TERM
trap 'for pid in "${pids[@]}"; do kill -s KILL -- "-$pid" 2>/dev/null || true; done; echo done >&"${COPROC[1]}"' EXIT

code=0
deadline=0 # when the patience with the rest ends, in seconds of this script; 0: no reason yet
while ((${#pids[@]} > 0)); do
    sleep 0.2 || true # a signal may cut it short
    alive=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            alive+=("$pid")
        else
            status=0
            wait "$pid" || status=$?
            ((code != 0)) || code=$status
        fi
    done
    pids=("${alive[@]+"${alive[@]}"}")
    # 75: all were asked to stop and are saving; else the rest waits in vain for the one that failed.
    if ((deadline == 0)) && { [[ -n "$signalled" ]] || ((code != 0)); }; then
        if ((code != 0 && code != 75)) && [[ -z "$signalled" && ${#pids[@]} -gt 0 ]]; then
            echo "local.sh: a process ended with code $code; ending the others" >&2
            kill -s TERM "${pids[@]}" 2>/dev/null || true
            deadline=$((SECONDS + 15))
        else
            deadline=$((SECONDS + 120))
        fi
    fi
    if ((deadline != 0 && SECONDS >= deadline)); then
        ((code != 0)) || code=137
        break # the EXIT trap kills what is left
    fi
done
exit "$code"
