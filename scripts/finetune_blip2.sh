#!/usr/bin/env bash
# Fine-tune BLIP-2 with CrossGET.
#
#   scripts/finetune_blip2.sh caption         # COCO captions as published: tower and Q-Former learn, OPT-2.7B is frozen
#   scripts/finetune_blip2.sh lora            # LoRA on the language model of every GPU there is, for question answering
#   scripts/finetune_blip2.sh tiny            # a small random BLIP-2 on the CPU, two minutes
#
# Further words are options: scripts/finetune_blip2.sh lora --learning_rate 1e-4 --max_steps 10
# Data: JSON, JSONL or parquet as for finetune_llava.sh, one image, one question and one answer a sample; a caption's
# question is empty. Paths are in scripts/configs/blip2_*.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-lora}
[[ $# -gt 0 ]] && shift
processes=${PROCESSES:-$(nvidia-smi -L 2>/dev/null | wc -l || true)}
[[ $processes -gt 0 ]] || processes=1

case $mode in
  caption|lora)
    torchrun --standalone --nproc_per_node "$processes" -m mllm_crossget train \
      "scripts/configs/blip2_opt_2.7b_$mode.yaml" "$@" ;;
  tiny)
    [[ -f runs/tiny_blip2/config.json ]] || python scripts/make_tiny_blip2.py
    [[ -f runs/toy_data/train.json ]] || python scripts/make_toy_data.py
    python -m mllm_crossget train scripts/configs/blip2_tiny.yaml "$@" ;;
  *) echo "first word must be caption, lora or tiny, got $mode" >&2; exit 2 ;;
esac
