#!/usr/bin/env bash
# ComfyUI at http://localhost:8188 with the models, LoRAs, embeddings and workflows of this folder, as the calling user.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as: sh launch_comfyui.sh
set -euo pipefail
cd "$(dirname "$0")"
if [ ! -f models/checkpoints/flux1-dev.safetensors ]; then # docker would make absent folders, as root
    echo "$PWD/models holds no checkpoints/flux1-dev.safetensors: run download.sh first" >&2
    exit 2
fi
mkdir -p models/loras models/embeddings output
comfyui=/workspace/ComfyUI
exec docker run --rm --pull never --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
    --user "$(id -u):$(id -g)" --env HOME=/tmp --env USER="$(id -un)" --publish 127.0.0.1:8188:8188 \
    --volume "$PWD/models/checkpoints:$comfyui/models/diffusion_models:ro" \
    --volume "$PWD/models/text_encoders:$comfyui/models/text_encoders:ro" \
    --volume "$PWD/models/vae:$comfyui/models/vae:ro" \
    --volume "$PWD/models/loras:$comfyui/models/loras:ro" \
    --volume "$PWD/models/embeddings:$comfyui/models/embeddings:ro" \
    --volume "$PWD/workflows:$comfyui/user/default/workflows" \
    --volume "$PWD/output:$comfyui/output" \
    flux-comfyui "$@"
