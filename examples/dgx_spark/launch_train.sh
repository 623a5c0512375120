#!/usr/bin/env bash
# Trains flux_data/ in the container, as the user who calls it. More flags go to the trainer: launch_train.sh --seed 1
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as: sh launch_train.sh
set -euo pipefail
cd "$(dirname "$0")"
if [ ! -f models/checkpoints/flux1-dev.safetensors ]; then # docker would make absent folders, as root
    echo "$PWD/models holds no checkpoints/flux1-dev.safetensors: run download.sh first" >&2
    exit 2
fi
mkdir -p models/loras
exec docker run --rm --pull never --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
    --user "$(id -u):$(id -g)" --env HOME=/tmp --env USER="$(id -un)" \
    --volume "$PWD/models:/workspace/models" \
    --volume "$PWD/flux_data:/workspace/flux_data" \
    --volume "$PWD/train.args:/workspace/train.args:ro" \
    flux-train @train.args "$@"
