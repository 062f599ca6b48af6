#!/usr/bin/env bash
# What docs/performance.md shows of a GPU, in some minutes: benchmarks/gpu.sh FOLDER
# The kernels' tests, then the figures, the most wanted first; results are written into FOLDER as they come. Most of a
# first run is compiling, so that is done side by side before anything is timed. PYTHON: the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: benchmarks/gpu.sh FOLDER}
mkdir -p "$folder"
python=${PYTHON:-.venv/bin/python}
limited() { timeout -k 5 "$@"; }  # seconds, command: a program that hangs ends nothing but itself
warm() { OMP_NUM_THREADS=2 limited 120 "$python" benchmarks/"$@" --out "$folder/warm-$RANDOM.json" >>"$folder/warm.txt" 2>&1 & }

limited 240 "$python" -m pytest -q -W ignore::DeprecationWarning \
    tests/components/test_fused.py tests/train/test_kernels.py tests/train/test_step.py >"$folder/tests.txt" 2>&1 &
for variant in dense kind; do
    warm models.py profile --model DiT-B --batch 64 --variants $variant --rounds 1
    warm models.py profile --model DiT-L --batch 128 --variants $variant --rounds 1
done
wait
for variant in dense kind; do warm models.py profile --model DiT-B --batch 256 --variants $variant --rounds 1; done
wait
rm -f "$folder"/warm-*.json
tail -n 3 "$folder/tests.txt"

for what in "models-gpu-DiT-L models.py gpu --model DiT-L --batches 128 --variants dense kind --rounds 10" \
    "models-gpu-DiT-B models.py gpu --model DiT-B --batches 64 256 --variants dense kind --rounds 10" \
    "models-profile-gpu models.py profile --model DiT-L --batch 128 --variants dense kind --rounds 2" \
    "fused-layers-gpu fused.py layers" "fused-tiles-gpu fused.py tiles --rounds 10" \
    "models-sampling-gpu models.py sampling --device cuda --model DiT-B --batch 64 --precision bf16"; do
    read -r name command <<<"$what"
    # shellcheck disable=SC2086
    limited 180 "$python" benchmarks/$command --out "$folder/$name.json" >"$folder/$name.txt" 2>&1 \
        && echo "$name: done" || { echo "$name: failed"; tail -n 3 "$folder/$name.txt"; }
done
