#!/usr/bin/env bash
# Fine-tune LLaVA-1.5 with CrossGET as published: 67K samples (every tenth of mix665k), one epoch, global batch 128.
#
#   scripts/finetune_llava.sh full            # the published recipe: full tuning, ZeRO-3, eight 80 GB GPUs
#   scripts/finetune_llava.sh lora            # LoRA on every GPU there is, DDP
#   scripts/finetune_llava.sh lora 13b
#   scripts/finetune_llava.sh tiny            # the embedded model on the CPU, two minutes
#
# Further words are options: scripts/finetune_llava.sh lora 7b --learning_rate 1e-4 --max_steps 10
# Data: llava_v1_5_mix665k.json, of which every tenth sample is taken, and its images in data/images.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-lora}
[[ $# -gt 0 ]] && shift
size=7b
if [[ ${1:-} == 7b || ${1:-} == 13b ]]; then size=$1; shift; fi
processes=${PROCESSES:-$(nvidia-smi -L 2>/dev/null | wc -l || true)}
[[ $processes -gt 0 ]] || processes=1

subset() { # every tenth sample, as the official data file
  [[ -f data/llava_v1_5_mix67k.json ]] || python -c 'import json
rows = json.load(open("data/llava_v1_5_mix665k.json"))
json.dump(rows[::10], open("data/llava_v1_5_mix67k.json", "w"))'
}

case $mode in
  full)
    [[ $size == 7b ]] || { echo "the published full recipe is for 7b; for 13b use lora" >&2; exit 2; }
    subset
    torchrun --standalone --nproc_per_node "$processes" -m mllm_crossget train scripts/configs/llava_1.5_7b_full.yaml \
      --deepspeed scripts/configs/zero3.json "$@" ;;
  lora)
    subset
    torchrun --standalone --nproc_per_node "$processes" -m mllm_crossget train \
      "scripts/configs/llava_1.5_${size}_lora.yaml" "$@" ;;
  tiny)
    [[ -f runs/toy_data/train.json ]] || python scripts/make_toy_data.py
    python -m mllm_crossget train scripts/configs/embedded.yaml "$@" ;;
  *) echo "first word must be full, lora or tiny, got $mode" >&2; exit 2 ;;
esac
