#!/usr/bin/env bash
# Run everything that needs a GPU in one call of under 8 minutes: the tests, then the benchmarks.
#
#     benchmarks/gpu.sh [FOLDER]        results go to FOLDER (benchmarks/results)
#
# Needs PyTorch for CUDA, timm, rich, pytest and pytest-xdist; widefield itself is taken from src, installed or not.
# PYTHON names the interpreter (python3). Each part has a time limit, 470 seconds in all. A benchmark that reaches its limit
# writes the rows it has. If a part fails, the others still run, and the exit status is 1.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
failed=()

depthwise=(--device cuda --resolutions 32)
kernels=(3 7 31)
mixture=(--device cuda --sets 3,5,7,9,11)
model=(convnext_tiny --device cuda --dtype bfloat16)

# First, in parallel: the tests, and a run of each benchmark to compile its kernels, which Triton caches. Timings taken now
# are unreliable, so block sizes and backend choices go to a temporary folder.
warm() { # warm NAME WORD...
    XDG_CACHE_HOME="$scratch/$1" timeout --kill-after=5 180 "$python" -m widefield bench "${@:2}" \
        --repeats 1 --budget 0.01 >"$scratch/$1.log" 2>&1 || { echo "-- compiling for $1:"; tail -n 3 "$scratch/$1.log"; }
}
start=$SECONDS
jobs=()
for kernel in "${kernels[@]}"; do
    for dtype in float32 bfloat16; do
        warm "depthwise-$kernel-$dtype" depthwise "${depthwise[@]}" --dtype "$dtype" --kernels "$kernel" --layers 1 &
        jobs+=($!)
    done
done
warm mixture mixture "${mixture[@]}" &
jobs+=($!)
warm model model "${model[@]}" &
jobs+=($!)
# The project's pytest options turn warnings into errors, which would fail on other versions of PyTorch.
XDG_CACHE_HOME="$scratch/tests" timeout --kill-after=5 180 "$python" -m pytest -o addopts= -o filterwarnings=default \
    -q -n 6 -p no:cacheprovider tests/ops/test_on_gpu.py || failed+=("tests")
wait "${jobs[@]}" || true
echo "== tests and compiling: $((SECONDS - start)) s of at most 180"

part() { # part NAME SECONDS WORD...
    local start=$SECONDS
    echo "== $1"
    timeout --signal=INT --kill-after=5 "$2" "$python" -m widefield bench "${@:3}" --out "$out" || failed+=("$1")
    echo "== $1: $((SECONDS - start)) s of at most $2"
}
few=("${depthwise[@]}" --kernels "${kernels[@]}" --repeats 5 --budget 0.3)
part "depthwise, float32" 75 depthwise "${few[@]}"
part "depthwise, bfloat16" 75 depthwise "${few[@]}" --dtype bfloat16
part mixture 75 mixture "${mixture[@]}" --repeats 5 --budget 0.3
part model 50 model "${model[@]}" --repeats 5

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
