#!/usr/bin/env bash
# Fetches FLUX.1-dev's four files and two tokenizers into models/, 34 GB. Stopped, it goes on where it was; a file counts
# when its size and SHA-256 are those the hub names for it. The token comes from the environment and goes nowhere else.
#
#     HF_TOKEN=... examples/dgx_spark/download.sh [FOLDER, by default the current one]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as: sh download.sh
set -euo pipefail

hub=${HF_ENDPOINT:-https://huggingface.co}
flux=black-forest-labs/FLUX.1-dev
encoders=comfyanonymous/flux_text_encoders

if [ -z "${HF_TOKEN:-}" ]; then
    echo "HF_TOKEN is not set: accept the licence at https://huggingface.co/$flux, make a token" >&2
    echo "at https://huggingface.co/settings/tokens, and export HF_TOKEN=hf_..." >&2
    exit 2
fi

request() { # the token is read from a pipe: arguments can be seen by every user of the machine
    curl --silent --show-error --suppress-connect-headers --retry 3 --config <(printf 'header = "Authorization: Bearer %s"\n' "$HF_TOKEN") "$@"
}

field() { # the value of a header in $headers
    tr -d '\r"' <<<"$headers" | awk -v name="$1:" 'tolower($1) == name { value = $2 } END { print value }'
}

complete() { # whether $1 has $size bytes and, where the hub names one, the SHA-256 $hash
    [ -f "$1" ] && [ "$(wc -c <"$1")" -eq "$size" ] || return 1
    [ -z "$hash" ] || [ "$(sha256sum "$1" | cut -d ' ' -f 1)" = "$hash" ]
}

fetch() { # file, repository, path in it
    local file=$1 url=$hub/$2/resolve/main/$3 status size hash headers
    headers=$(request --head "$url")
    status=$(awk 'NR == 1 { print $2 }' <<<"$headers")
    case $status in
        200 | 302 | 307) ;;
        401 | 403) echo "$url: refused ($status). Is HF_TOKEN valid, and the licence accepted on the model's page?" >&2; exit 1 ;;
        *) echo "$url: the server answers $status" >&2; exit 1 ;;
    esac
    size=$(field x-linked-size) hash=$(field x-linked-etag)
    if [[ $file = *.safetensors ]] && { [ -z "$size" ] || [ ${#hash} -ne 64 ]; }; then
        echo "$url: the server names no size and SHA-256: this is no model file" >&2
        exit 1
    fi
    if [ -z "$size" ]; then # a small file, whose size stands where the hub sends it from
        headers=$(request --head --location "$url")
        size=$(field content-length)
    fi
    [ ${#hash} -eq 64 ] || hash=
    if complete "$file"; then
        echo "$file: complete"
        return
    fi
    mkdir -p "$(dirname "$file")"
    [ ! -f "$file" ] || mv "$file" "$file.partial"
    for _ in again "from the start"; do
        if [ ! -f "$file.partial" ] || [ "$(wc -c <"$file.partial")" -lt "$size" ]; then
            echo "$file: $size bytes"
            request --fail --location --continue-at - --output "$file.partial" "$url" || true
        fi
        if complete "$file.partial"; then
            mv "$file.partial" "$file"
            return
        fi
        if [ -f "$file.partial" ] && [ "$(wc -c <"$file.partial")" -lt "$size" ]; then
            echo "$file: the connection broke off; start again to go on" >&2
            exit 1
        fi
        rm -f "$file.partial" # of the right size or more, but something else
    done
    echo "$file: what was sent is not the file that the hub describes" >&2
    exit 1
}

cd "${1:-.}"
fetch models/checkpoints/flux1-dev.safetensors $flux flux1-dev.safetensors
fetch models/vae/ae.safetensors $flux ae.safetensors
fetch models/text_encoders/clip_l.safetensors $encoders clip_l.safetensors
fetch models/text_encoders/t5xxl_fp16.safetensors $encoders t5xxl_fp16.safetensors
for file in vocab.json merges.txt special_tokens_map.json tokenizer_config.json; do
    fetch models/tokenizers/tokenizer/$file $flux tokenizer/$file
done
for file in spiece.model tokenizer.json special_tokens_map.json tokenizer_config.json; do
    fetch models/tokenizers/tokenizer_2/$file $flux tokenizer_2/$file
done
mkdir -p models/loras models/embeddings
