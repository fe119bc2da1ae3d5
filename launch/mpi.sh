#!/usr/bin/env bash
# A run under mpirun (Open MPI, MPICH, Intel MPI), with one process per GPU. MPI only starts the processes.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/mpi.sh MPIRUN OPTIONS ... -- [ARGUMENTS ...]

e.g.   launch/mpi.sh -np 16 --hostfile hosts -- --config=configs/vit_huge.py

Runs python -m visionfm_jax.main ARGUMENTS in every process. The folder that holds launch/ must be at the same path on all hosts. A
short mpirun first determines the address of rank 0, where the processes connect.

  MPIRUN=mpiexec                     command to use instead of mpirun
  VISIONFM_COORDINATOR=HOST:PORT     address of rank 0, instead of determining it
  PYTHON=/path/to/python             Python to run (default: .venv/bin/python of that folder)
TEXT
}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
self=$root/launch/$(basename "${BASH_SOURCE[0]}")
[[ -n "${PYTHON:-}" ]] || PYTHON=$root/.venv/bin/python

# The names of the rank, the size, and the same within one host: Open MPI, then MPICH and Intel MPI.
rank=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-}}
size=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-}}
local_rank=${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-0}}
local_size=${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS:-1}}

case "${1:-}" in
"" | --help | -h)
    usage
    exit 0
    ;;
--say-address) # in a rank of the first mpirun
    [[ "$rank" == 0 ]] || exit 0
    exec "$2" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(f"address={socket.getfqdn()}:{s.getsockname()[1]}")'
    ;;
--rank) # in a rank of the run
    if [[ -z "$rank" || -z "$size" ]]; then
        echo "error: this MPI sets neither OMPI_COMM_WORLD_RANK nor PMI_RANK; set VISIONFM_PROCESS yourself" >&2
        exit 2
    fi
    export VISIONFM_COORDINATOR=$2 VISIONFM_PROCESSES=$size VISIONFM_PROCESS=$rank
    PYTHON=$3
    shift 3
    if ((local_size > 1)) && [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]] && command -v nvidia-smi >/dev/null; then
        export CUDA_VISIBLE_DEVICES=$local_rank # one GPU each
    fi
    cd "$root"
    # shellcheck source=launch/env.sh
    source launch/env.sh
    exec "$PYTHON" -m visionfm_jax.main "$@"
    ;;
esac

options=()
while (($# > 0)) && [[ "$1" != "--" ]]; do
    options+=("$1")
    shift
done
if (($# == 0)); then
    echo "error: no -- between the options of mpirun and the arguments of the run; see launch/mpi.sh --help" >&2
    exit 2
fi
shift

# Open MPI kills one second after its SIGTERM; a run needs longer to save its state.
export OMPI_MCA_odls_base_sigkill_timeout="${OMPI_MCA_odls_base_sigkill_timeout:-120}"
start=("${MPIRUN:-mpirun}" "${options[@]+"${options[@]}"}")
if [[ -z "${VISIONFM_COORDINATOR:-}" ]]; then
    VISIONFM_COORDINATOR=$("${start[@]}" bash "$self" --say-address "$PYTHON" | sed -n 's/.*address=//p')
    if [[ -z "$VISIONFM_COORDINATOR" ]]; then
        echo "error: the address of rank 0 cannot be determined; set VISIONFM_COORDINATOR=HOST:PORT" >&2
        exit 2
    fi
fi
exec "${start[@]}" bash "$self" --rank "$VISIONFM_COORDINATOR" "$PYTHON" "$@"
