#!/usr/bin/env bash
# Teaches the toy FLUX a thing it has never seen from six images, on a CPU, in minutes, and shows before and after.
# Needs Python 3.11 or later and nothing else.     examples/quickstart.sh [new output folder]
set -euo pipefail
out=${1:-quickstart}
case $out in /*) ;; *) out=$PWD/$out ;; esac
if [ -e "$out" ] && [ ! -e "$out/.made-by-quickstart" ]; then
    echo "$out exists and is not from an earlier quickstart: name a new folder" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
missing=
folder=$out
while [ ! -e "$folder" ]; do folder=$(dirname "$folder"); done
[ -d "$folder" ] && [ -w "$folder" ] || missing+=$'\n'"  a folder that may be written in place of $out"
[ -w . ] || missing+=$'\n'"  permission to write in $PWD"
has_python=
python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && has_python=yes ||
    missing+=$'\n  Python 3.11 or later, as python3'
if [ ! -x .venv/bin/accelerate ]; then # nothing is installed yet
    [ -z "$has_python" ] || python3 -c "import ensurepip" 2>/dev/null || missing+=$'\n  the Python package venv (Debian, Ubuntu: apt install python3-venv)'
    free=$(df -Pk . | awk 'END {print int($4 / 1024 / 1024)}')
    [ "$free" -ge 3 ] || missing+=$'\n'"  3 GB of disk, of which $free are free in $PWD; CUDA's libraries take several more"
fi
if [ -z "$missing" ]; then
    .venv/bin/python -m pip --version >/dev/null 2>&1 || python3 -m venv .venv # also where a .venv has no pip
    # where pip was told of a folder of packages, it needs no index
    [ -x .venv/bin/accelerate ] || [ -n "${PIP_FIND_LINKS:-}" ] || .venv/bin/python -m pip index versions pip --retries 0 >/dev/null 2>&1 ||
        missing+=$'\n  the network: pip reaches no package index'
fi
if [ -n "$missing" ]; then
    echo "Nothing was installed; the quickstart needs:$missing" >&2
    exit 2
fi
printf '\n%s\n' "1/5 Installing what the trainers need into $PWD/.venv (minutes, without a word)"
.venv/bin/python -m pip install --quiet --requirement requirements.txt
rm -rf "$out"
mkdir -p "$out"
touch "$out/.made-by-quickstart"
export TRANSFORMERS_VERBOSITY=error

printf '\n%s\n' "2/5 Drawing six pictures of a subject that the toy FLUX has never seen: \"sks glyph\", a violet ring around a yellow dot"
.venv/bin/python examples/toy/world.py glyph "$out/images" --count 6
printf '\n%s\n' "3/5 Training a LoRA on them. First the model draws 240 pictures of other things, which remind it of what it knows"
.venv/bin/python train_dreambooth_flux_advanced.py \
    --pretrained_model_name_or_path examples/toy/flux --max_sequence_length 32 \
    --instance_data_dir "$out/images" --resolution 64 --cache_latents \
    --instance_prompt "sks glyph" --caption_dropout 0.2 --caption_dropout_to instance_prompt \
    --rank 4 --lora_alpha 4 --lora_layers to_q,to_k,to_v,net.0.proj,net.2,proj_mlp,proj_out \
    --train_batch_size 6 --repeats 4 --guidance_scale 1 \
    --learning_rate 3e-3 --lr_scheduler cosine --lr_warmup_steps 10 --max_train_steps 900 \
    --timestep_sampling shift --discrete_flow_shift 3 \
    --with_prior_preservation --class_data_dir "$out/class_images" --class_prompt examples/toy/prompts.txt \
    --num_class_images 240 --sample_batch_size 40 --prior_target base --prior_loss_weight 2 \
    --validation_prompt "sks glyph on a blue background" --validation_steps 300 \
    --output_dir "$out/lora"
printf '\n%s\n' "4/5 Drawing the same prompts without and with the LoRA. Scores say how many of 100 show what was asked for"
.venv/bin/python examples/toy/compare.py "$out/lora" --subject glyph --output "$out/before_after.png"

printf '\n%s\n' "5/5 Done"
echo "Look at $out/before_after.png and $out/lora/loss.png; the LoRA is $out/lora/pytorch_lora_weights.safetensors"
echo "For your own photos: .venv/bin/python examples/suggest.py photos/ --gpu 12GB --class_word dog   (the memory of your card, and what they show)"
if [ -t 1 ]; then # opens the picture where there is a desktop
    if [ "$(uname)" = Darwin ]; then
        open "$out/before_after.png" || true
    elif [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ] && command -v xdg-open >/dev/null; then
        xdg-open "$out/before_after.png" >/dev/null 2>&1 || true
    fi
fi
