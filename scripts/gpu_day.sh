#!/usr/bin/env bash
# Everything that is still to be measured on a GPU, in at most 8 minutes on one device, with nothing to download.
#   scripts/gpu_day.sh [FOLDER]          results as they come, in FOLDER (eval/results/gpu)
#   scripts/gpu_day.sh --dry [FOLDER]    the same parts with tiny sizes on the CPU, to see that they run
# A part that fails or runs out of its time does not stop the others; the last lines say which.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=""
if [ "${1:-}" = --dry ]; then dry=--dry; shift; fi
folder=${1:-eval/results/gpu}
python=${PYTHON:-python}
mkdir -p "$folder"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
status=0
summary=()

part() { # NAME SECONDS COMMAND...
    local name=$1 most=$2 begun=$SECONDS result
    shift 2
    echo "=== $name"
    timeout $((most * patience)) "$@" >"$folder/$name.log" 2>&1
    result=$?
    [ "$result" -eq 0 ] || { status=1; tail -n 3 "$folder/$name.log"; }
    summary+=("$name: exit $result after $((SECONDS - begun)) s")
}

if [ -n "$dry" ]; then
    model=mllm_crossget/embedded/weights
    sizes=(--geometry "$model" --rounds 1 --tower_rounds 1 --text_tokens 8 --keep_ratios 0.5)
    batches=(1 2) dtype=float32 lengths=(1 2) patience=5 kernels=0 # Triton's interpreter would take minutes
else
    sizes=(--geometry llava-1.5-7b --rounds 3 --tower_rounds 5 --keep_ratios 0.5 0.25 0.11 --r 13)
    batches=(1 32) dtype=bfloat16 lengths=(1 128) patience=1 kernels=1
fi
bench=("$python" -m mllm_crossget bench)

part checks 90 "$python" scripts/gpu_checks.py $dry
part llava 150 "${bench[@]}" "${sizes[@]}" --dtype $dtype --batch_sizes "${batches[@]}" \
    --new_tokens "${lengths[@]}" --memory --output "$folder/llava.jsonl"
part llava_kernels 60 env MLLM_CROSSGET_FUSED_MATCHING=$kernels MLLM_CROSSGET_FUSED_IMPORTANCE=$kernels \
    "${bench[@]}" "${sizes[@]}" --dtype $dtype --batch_sizes "${batches[@]}" --output "$folder/llava_kernels.jsonl"
part training 90 "${bench[@]}" --train "${sizes[@]:0:2}" --rounds 2 --dtype $dtype --keep_ratios 0.5 \
    --batch_sizes "${batches[0]}" --text_tokens 8 --memory --output "$folder/training.jsonl"
part reducer 60 "$python" -m mllm_crossget bench-reducer ${dry:+--tokens 64} ${dry:+--rounds 1} \
    --output "$folder/reducer.json"

printf '%s\n' "${summary[@]}" | tee "$folder/summary.txt"
exit $status
