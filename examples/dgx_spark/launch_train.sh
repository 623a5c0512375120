#!/usr/bin/env bash
# Trains flux_data/ in the container, as the user who calls it. More flags go to the trainer: launch_train.sh --seed 1
# Runs there what the training prints at its end: launch_train.sh python examples/dreambooth/generate.py ...
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as: sh launch_train.sh
set -euo pipefail
cd "$(dirname "$0")"
if [ ! -f models/checkpoints/flux1-dev.safetensors ]; then # docker would make absent folders, as root
    echo "$PWD/models holds no checkpoints/flux1-dev.safetensors: run download.sh first" >&2
    exit 2
fi
mkdir -p models/loras
if [ "${1:-}" = python ]; then
    shift
else
    set -- train_dreambooth_flux_advanced.py @train.args "$@"
fi
exec docker run --rm --pull never --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
    --user "$(id -u):$(id -g)" --env HOME=/tmp --env USER="$(id -un)" \
    --env PYTHON_COMMAND="$(printf %q "$(pwd)/launch_train.sh") python" \
    --volume "$PWD/models:/workspace/models" \
    --volume "$PWD/flux_data:/workspace/flux_data" \
    --volume "$PWD/train.args:/workspace/train.args:ro" \
    flux-train "$@"
