#!/usr/bin/env bash
# All encoder kernels of a BERT-base on a GPU, beside as many SVDs: benchmarks/gpu.sh [FILE.json] [options of
# python -m benchmarks.kernels]. Needs a Python (PYTHON=, else python3) with a jax that sees the GPU; WLRA_GPU_OPTIONAL=1
# lets it run without one.
set -euo pipefail
output=${1:-kernels.json}
shift || true
case $output in /*) ;; *) output=$PWD/$output ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -z "${WLRA_GPU_OPTIONAL:-}" ]; then
  "$python" -c 'import jax; got = jax.default_backend(); assert got == "gpu", f"jax must see a GPU; it sees: {got}"'
fi
PYTHONPATH=$PWD exec "$python" -m benchmarks.kernels --output "$output" "$@"
