#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under 8 minutes: the tests, then the benchmarks.
#
#     benchmarks/gpu.sh [FOLDER]        results go to FOLDER (benchmarks/results)
#
# Needs PyTorch for CUDA, timm, rich, pytest and pytest-xdist; widefield itself is taken from src, installed or not.
# PYTHON names the interpreter (python3). Each part has a limit of time, 470 seconds in all. A benchmark that runs out of
# it writes the rows that it has; no part that fails keeps the others from running, but the exit status is then 1.
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

# First, side by side: the tests, and the benchmarks once for the kernels that they compile, which Triton keeps. What
# they time now is disturbed: block sizes and choices of backend go to a folder that is thrown away.
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
# The project's own options for pytest stop at warnings, of other versions of PyTorch too.
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
