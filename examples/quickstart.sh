#!/usr/bin/env bash
# Teaches the toy FLUX a thing it has never seen from six pictures, on a CPU, in minutes, and shows before and after.
# Needs Python 3.10 or later and nothing else.     examples/quickstart.sh [output folder]
set -euo pipefail
out=$(mkdir -p "${1:-quickstart}" && cd "${1:-quickstart}" && pwd)
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --requirement requirements.txt
export TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
rm -rf "$out/pictures" "$out/lora"

.venv/bin/python examples/toy/world.py glyph "$out/pictures" --count 6
.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    train_dreambooth_flux_advanced.py \
    --pretrained_model_name_or_path examples/toy/flux --max_sequence_length 32 \
    --instance_data_dir "$out/pictures" --resolution 64 --repeats 4 --cache_latents --train_batch_size 4 \
    --rank 8 --lora_alpha 8 --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 10 \
    --max_train_steps 300 --checkpointing_steps 150 \
    --validation_prompt "sks glyph on a blue background" --validation_steps 100 \
    --output_dir "$out/lora"
.venv/bin/python examples/toy/compare.py "$out/lora" --subject glyph --output "$out/before_after.png"

echo "Before and after: $out/before_after.png   loss: $out/lora/loss.png   LoRA: $out/lora/pytorch_lora_weights.safetensors"
