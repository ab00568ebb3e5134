#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and under nine minutes: the kernel tests and the parity tests on
# the GPU first, then the benchmarks, the whole round first. Those that no time is left for can be named in another run.
# Needs no network: the package is installed without its dependencies.
#
#   bash benchmarks/gpu.sh [DIRECTORY FOR RESULTS [BENCHMARK ...]]     (default: $OUT, else benchmarks/results; all)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results}}
python=${PYTHON:-python3}
shift
mkdir -p "$out"
"$python" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "no CUDA device")' || exit 1
"$python" -c 'import seal_engine' 2>/dev/null ||
  "$python" -m pip install -q --no-deps --no-build-isolation --no-index -e . ||
  export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

timeout 220 "$python" -m pytest tests/kernels tests/test_gpu.py -q -x -k 'not compile_gate' -p no:cacheprovider -p no:warnings 2>&1 |
  tee "$out/gpu_tests.log"
status=$?
# What matters most first, and each group's results on disk before the next begins: nine minutes are soon over. The round
# keeps its rows as its parts are done.
groups=('bench_seal_round' 'bench_train bench_scaling' 'bench_lora bench_adamw'
  'bench_paged_attention bench_sampling bench_sample'
  'bench_attention bench_cross_entropy bench_linear bench_model bench_rms_norm bench_rotary bench_swiglu')
(($#)) && groups=("$@")
for group in "${groups[@]}"; do
  left=$((525 - SECONDS))
  [[ $group == bench_seal_round ]] && left=$((left < 430 ? left : 430))
  if ((left < 20)); then
    echo "no time left for: $group"
    continue
  fi
  files=()
  for name in $group; do files+=("benchmarks/$name.py"); done
  timeout "$left" "$python" -m pytest "${files[@]}" -q -p no:cacheprovider -p no:warnings --record "$out" 2>&1 |
    tee -a "$out/gpu_benchmarks.log"
  result=$?
  status=$((status ? status : result))
done
exit "$status"
