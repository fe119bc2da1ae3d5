#!/usr/bin/env bash
# XLA and NCCL settings for runs on GPUs: `source launch/env.sh`; slurm.sbatch, k8s-jobset.yaml, mpi.sh and local.sh do.
# What is set already stays: XLA takes the last of two equal flags, and the variables below yield to yours.
# From jax 0.12 on, turn the pipelined gathers off by --xla_gpu_pipeline_all_gather=off: beside the =on below, the former
# --xla_gpu_enable_pipelined_all_gather=false is another flag, and has no effect.

# XLA's settings depend on the version of jax: `xla_flags` in visionfm_jax/parallel/targets.py has them, each with its
# reason. A plan compiles with the same.
visionfm_python="${PYTHON:-python3}"
[[ -n "${PYTHON:-}${VIRTUAL_ENV:-}" || ! -x .venv/bin/python ]] || visionfm_python=.venv/bin/python
if ! visionfm_flags=$("$visionfm_python" -m visionfm_jax.parallel.targets); then
    echo "error: launch/env.sh: $visionfm_python cannot say XLA's settings; set PYTHON to the one that has visionfm_jax" >&2
    return 2 2>/dev/null || exit 2
fi
export XLA_FLAGS="$visionfm_flags${XLA_FLAGS:+ $XLA_FLAGS}"
unset visionfm_flags visionfm_python

# XLA reserves this share of the memory at start. The rest is for what it does not see: CUDA contexts, NCCL's
# buffers and cuDNN; JAX's default of 0.75 leaves 20 GB of an 80 GB GPU unused.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

# Not set: CUDA_DEVICE_MAX_CONNECTIONS=1, which NVIDIA advised for one order of launches (XLA has one of its own) and
# advises against from Blackwell on; NCCL_NVLS_ENABLE, as NCCL uses NVLink's own sums where there are any. By
# benchmarks/flag_sweep.py a cluster says what is faster there.

# Say why a collective failed (a lost link, a peer that closed); silent otherwise.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# One process that drives several GPUs may deadlock when each launches its collective separately.
export NCCL_LAUNCH_MODE="${NCCL_LAUNCH_MODE:-GROUP}"

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then # run instead of sourced: show what it sets
    set -euo pipefail
    [[ "${1:-}" != "--help" && "${1:-}" != "-h" ]] || { echo "usage: source launch/env.sh   (run it to print the settings)"; exit 0; }
    env | grep -E '^(XLA|NCCL)_' | sort
fi
