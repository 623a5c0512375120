#!/usr/bin/env bash
# Subjects200K for subject-driven generation: pairs of images side by side, with two captions each.
#     examples/omini/download_subjects.sh [folder] [number of parquet files, default 2, all is 0]
set -euo pipefail
folder=${1:-data/Subjects200K}
count=${2:-2}
include=()
for ((i = 0; i < count; i++)); do include+=(--include "$(printf 'data/train-%05d-of-*.parquet' "$i")"); done
[ "$count" -gt 0 ] || include=(--include "data/train-*.parquet")
hf download Yuanshi/Subjects200K --repo-type dataset --local-dir "$folder" "${include[@]}"
echo "In $folder: --dataset_name $folder"
