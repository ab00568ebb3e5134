#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and under nine minutes: the kernel tests and the parity tests on
# the GPU first, then the benchmarks. Needs no network: the package is installed without its dependencies.
#
#   bash benchmarks/gpu.sh [DIRECTORY FOR RESULTS]     (default: $OUT, else benchmarks/results)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results}}
python=${PYTHON:-python3}
mkdir -p "$out"
"$python" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "no CUDA device")' || exit 1
"$python" -c 'import seal_engine' 2>/dev/null ||
  "$python" -m pip install -q --no-deps --no-build-isolation --no-index -e . ||
  export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

timeout 240 "$python" -m pytest tests/kernels tests/test_gpu.py -q -x -k 'not compile_gate' -p no:cacheprovider -p no:warnings 2>&1 |
  tee "$out/gpu_tests.log"
tests=$?
timeout 280 "$python" -m pytest benchmarks -q -p no:cacheprovider -p no:warnings --record "$out" 2>&1 | tee "$out/gpu_benchmarks.log"
benchmarks=$?
exit $((tests ? tests : benchmarks))
