#!/usr/bin/env bash
# Trains flux_data/ in the container, as the user who calls it. More flags go to the trainer: launch_train.sh --seed 1
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p models/loras
exec docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
    --user "$(id -u):$(id -g)" --env HOME=/tmp \
    --volume "$PWD/models:/workspace/models" \
    --volume "$PWD/flux_data:/workspace/flux_data" \
    --volume "$PWD/train.args:/workspace/train.args:ro" \
    flux-train @train.args "$@"
