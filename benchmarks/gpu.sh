#!/usr/bin/env bash
# What needs an NVIDIA GPU, in stages of under four minutes; a stage's results are in the directory before the next
# begins, and stay there if that one is killed. Needs no network: the package is installed without its dependencies.
#
#   bash benchmarks/gpu.sh [DIRECTORY [STAGE ...]]     DIRECTORY: default $OUT, else benchmarks/results
#
#   smoke     a kernel, a training step, a greedy completion, the loop
#   tests     all tests of the kernels and of parity, on the GPU
#   round     a whole round of the published knowledge task
#   kernels   each kernel beside its roofline
#   scaling   training and sampling by the number of adapters, beside PEFT and Transformers
#
# Without stages: all of them, in this order, as far as TOTAL_SECONDS (default 530) reach.
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
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
# Compiling takes most of the tests' time, and is the CPU's.
workers=(); "$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc)")
quiet=(-q -p no:cacheprovider -W ignore -o tmp_path_retention_policy=failed)
# A baseline's checkpoint has 15 GB and two may be there at once: in memory where that is large enough, else on the disk.
(($(df --output=avail -k /dev/shm | tail -1) > 48 * 2**20)) && export TMPDIR=/dev/shm

stage() { # NAME SECONDS PYTEST-ARGUMENTS: runs pytest into NAME.log, and says how it ended
  local name=$1 limit=$2 left=$((${TOTAL_SECONDS:-530} - SECONDS))
  shift 2
  ((left < limit)) && limit=$left
  if ((limit < 15)); then
    echo "$name: no time left; name it in another run"
    return 0
  fi
  timeout "$limit" "$python" -m pytest "$@" "${quiet[@]}" 2>&1 | tee "$out/gpu_$name.log" | tail -n 40
  local result=$?
  echo "$name: exit status $result after $SECONDS s in all"
  return "$result"
}

benchmarks() { printf 'benchmarks/bench_%s.py\n' "$@"; }
status=0
(($#)) || set -- smoke tests round kernels scaling
for name in "$@"; do
  case $name in
    smoke) stage smoke 90 tests/test_smoke.py ;;
    tests) stage tests 235 tests/kernels tests/test_gpu.py -k 'not compile_gate' "${workers[@]}" ;;
    round) stage round 235 $(benchmarks seal_round) --record "$out" ;;
    kernels) stage kernels 235 $(benchmarks lora attention paged_attention sampling cross_entropy adamw linear rms_norm swiglu rotary) --record "$out" ;;
    scaling) stage scaling 235 $(benchmarks scaling train sample model) --record "$out" ;;
    *) echo "unknown stage $name; accepted: smoke tests round kernels scaling"; exit 2 ;;
  esac
  result=$?
  status=$((status ? status : result))
done
exit "$status"
