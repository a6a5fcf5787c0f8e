#!/usr/bin/env bash
# QLoRA for LLaVA-1.5-7B on one GPU (bitsandbytes NF4). Estimated memory: 4.5 GB weights + about 6 GB activations.
#
#   scripts/finetune_qlora.sh                 # options follow: --bits 8 --per_device_train_batch_size 1
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -f data/llava_v1_5_mix67k.json ]] || { echo "data/llava_v1_5_mix67k.json is missing; see finetune_llava.sh" >&2; exit 2; }
python -m mllm_crossget train scripts/configs/llava_1.5_7b_qlora.yaml "$@"
