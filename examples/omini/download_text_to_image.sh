#!/usr/bin/env bash
# text-to-image-2M for conditions made from any image: webdataset tars of 512 px images with prompts.
#     examples/omini/download_text_to_image.sh [folder] [number of tars, default 2, all is 0]
set -euo pipefail
folder=${1:-data/text-to-image-2M}
count=${2:-2}
include=()
for ((i = 0; i < count; i++)); do include+=(--include "$(printf 'data_512_2M/data_%06d.tar' "$i")"); done
[ "$count" -gt 0 ] || include=(--include "data_512_2M/data_*.tar")
hf download jackyhate/text-to-image-2M --repo-type dataset --local-dir "$folder" "${include[@]}"
echo "In $folder: --data_files '$folder/data_512_2M/*.tar'"
