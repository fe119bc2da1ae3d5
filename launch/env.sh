#!/usr/bin/env bash
# XLA and NCCL settings for runs on GPUs: `source launch/env.sh`; slurm.sbatch, k8s-jobset.yaml, mpi.sh and local.sh do.
# What is set already stays: XLA takes the last of two equal flags, and the variables below yield to yours.

# Start a collective as early and wait for it as late as its data allow: without this the weight gathers of
# ZeRO-3 stand between the layers instead of running below them.
flags="--xla_gpu_enable_latency_hiding_scheduler=true"
# Gather the next layer's weights while this one computes: a layer cannot hide the gather of its own. One more
# layer's weights are held.
flags+=" --xla_gpu_enable_pipelined_all_gather=true"
# Join the small gathers of one layer (weights, biases, norms) into one of up to 256 MiB: more than a layer
# of the largest model here in bf16, so each layer pays one latency.
flags+=" --xla_gpu_all_gather_combine_threshold_bytes=268435456"
# The same for the gradients that are scattered after each layer's backward pass.
flags+=" --xla_gpu_reduce_scatter_combine_threshold_bytes=268435456"
# And for plain data parallelism (stage 0 and replicas): large, but small enough that the first all-reduce
# can run while later gradients are still computed.
flags+=" --xla_gpu_all_reduce_combine_threshold_bytes=268435456"
export XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"
unset flags

# XLA reserves this share of the memory at start. The rest is for what it does not see: CUDA contexts, NCCL's
# buffers and cuDNN; JAX's default of 0.75 leaves 20 GB of an 80 GB GPU unused.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

# Say why a collective failed (a lost link, a peer that closed); silent otherwise.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# One process that drives several GPUs may deadlock when each launches its collective separately.
export NCCL_LAUNCH_MODE="${NCCL_LAUNCH_MODE:-GROUP}"

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then # run instead of sourced: show what it sets
    set -euo pipefail
    [[ "${1:-}" != "--help" && "${1:-}" != "-h" ]] || { echo "usage: source launch/env.sh   (run it to print the settings)"; exit 0; }
    env | grep -E '^(XLA|NCCL)_' | sort
fi
