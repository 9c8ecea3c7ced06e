#!/usr/bin/env bash
# All that a CUDA GPU must show of the kernels: tests, memory checks, then benchmarks (OUTPUT.md and OUTPUT.json).
#
#   scripts/gpu_matrix.sh                       meant to take under ten minutes on an H100; not timed in one go yet
#   OUTPUT=h200 scripts/gpu_matrix.sh --repeats 50
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -n 8 -k "not 32_bits" tests/test_{triton,triton_gpu,backend,fused}.py
python -m pytest -n 0 -k 32_bits tests/test_triton_gpu.py # each takes 20 GB
if command -v compute-sanitizer >/dev/null; then
    # without torch's own pool of memory, in which a read past a tensor's end would go unseen
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 python -m pytest -n 0 tests/test_triton.py \
        -k "as_exact and 7 or residual_and_activation or merged_at_once"
else
    echo "compute-sanitizer is not installed: memory was not checked"
fi
python scripts/benchmark_gpu.py --output "${OUTPUT:-results}" "$@"
