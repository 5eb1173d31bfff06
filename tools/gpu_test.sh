#!/usr/bin/env bash
# ./run gpu-test. On a machine with an NVIDIA GPU: runs every check that needs one and ends with "N passed, N failed".
# On a machine without: builds for sm_90a and packs what the other machine needs (binaries, their libraries, models)
# into .carry/gpu, for a GPU machine that has no compiler or packages; there, run this script again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
carry=.carry/gpu
models=("models/mini-qwen3-int4")
if [[ -n "${ORBIT_MODELS:-}" ]]; then
    models+=("$ORBIT_MODELS/mini-qwen3" "$ORBIT_MODELS/mini-llama" "$ORBIT_MODELS/packed/mini-qwen3-int4"
        "$ORBIT_MODELS/packed/mini-qwen3-moe-int4")
fi

pack() {
    ./run cuda
    rm -rf "$carry"
    mkdir -p "$carry/lib" "$carry/models"
    cp build-cuda/orbit build-cuda/opcheck "$carry/"
    strip "$carry/orbit" "$carry/opcheck"
    # All shared libraries but the C and C++ run time, which the other machine has in a newer version.
    ldd build-cuda/orbit build-cuda/opcheck | awk '/=> \// { print $3 }' | sort -u |
        grep -vE '/(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux[^/]*)\.so' | xargs -r cp -L -t "$carry/lib"
    local model
    for model in "${models[@]:1}"; do
        cp -r "$model" "$carry/models/$(echo "${model#"$ORBIT_MODELS"/}" | tr / -)"
    done
    # One archive: both binaries hold the same code for the GPU, and what travels is limited.
    tar c -C "$carry" orbit opcheck lib models | xz --lzma2=preset=2,dict=256MiB >"$carry.tar.xz"
    rm -rf "${carry:?}"/*
    mv "$carry.tar.xz" "$carry/all.tar.xz"
    du -sh "$carry"
}

passed=0
failed=0

check() { # NAME COMMAND... A function must return its failures itself: set -e is off while it runs here.
    local name=$1 status=0 started=$SECONDS
    shift
    echo "== $name"
    "$@" || status=$?
    if [[ $status == 0 ]]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    echo "-- $name: $([[ $status == 0 ]] && echo ok || echo "FAILED ($status)") in $((SECONDS - started)) s"
}

# All cases, in processes side by side: most of the time is the CPU's, which computes the references.
opcheck_in_parts() {
    local opcheck=$1 parts part status=0 folder pids=()
    parts=$(($(nproc) < 8 ? $(nproc) : 8))
    folder=$(mktemp -d)
    for ((part = 0; part < parts; ++part)); do
        "$opcheck" --device cuda:0 --part "$part/$parts" >"$folder/$part" 2>&1 &
        pids+=($!)
    done
    for part in "${pids[@]}"; do wait "$part" || status=1; done
    cat "$folder"/*
    awk '/ passed, .* failed$/ { passed += $1; failed += $3 } END { print "opcheck: " passed " passed, " failed " failed" }' \
        "$folder"/*
    rm -rf "$folder"
    return $status
}

# Differences to the reference on the GPU: at most 1.5 times those of the CPU in the same precision.
verify_beside_cpu() {
    local orbit=$1 model=$2 cpu limits
    cpu=$("$orbit" verify "$model" --reference "$model" --device cpu | tail -n 1)
    echo "cpu: $cpu"
    limits=$(echo "$cpu" | awk -F'[ ,]+' '{ print $4 * 1.5, ($NF > 0 ? $NF * 1.5 : 1) }')
    "$orbit" verify "$model" --reference "$model" --device cuda:0 --tolerance "${limits% *}" \
        --gradient-tolerance "${limits#* }"
}

# The same run twice, once killed and resumed, once with layer inputs in host memory, and once with all of a layer
# computed again for backward: equal files.
same_bits() {
    local orbit=$1 folder
    folder=$(mktemp -d)
    local train=("$orbit" train examples/demo/run.toml --set device=cuda:0 --set train.steps=6 --set checkpoint.every=2
        --set eval.max_questions=64)
    "${train[@]}" --run "$folder/a" 2>/dev/null || return 1
    "${train[@]}" --run "$folder/b" 2>/dev/null || return 1
    "${train[@]}" --run "$folder/d" --set train.activation_offloading=true 2>/dev/null || return 1
    "${train[@]}" --run "$folder/e" --set train.recompute=full 2>/dev/null || return 1
    "${train[@]}" --run "$folder/c" 2>/dev/null &
    local pid=$!
    while [[ ! -s "$folder/c/metrics.jsonl" ]] || [[ $(wc -l <"$folder/c/metrics.jsonl") -lt 3 ]]; do
        kill -0 $pid || return 1
        sleep 0.05
    done
    kill -9 $pid
    wait $pid 2>/dev/null || true
    "$orbit" resume "$folder/c" 2>/dev/null || return 1
    local other
    for other in b c d e; do
        cmp "$folder/a/adapter/adapter_model.safetensors" "$folder/$other/adapter/adapter_model.safetensors" || return 1
        cmp "$folder/a/rollouts.jsonl" "$folder/$other/rollouts.jsonl" || return 1
    done
    rm -rf "$folder"
}

# Experts in host memory change no bit: rollout, training and decoding through captured graphs.
host_experts() {
    local orbit=$1 model=$2 layers=$3 folder kind
    "$orbit" parity "$model" --device cuda:0 --host-layers "$layers" --texts 16 --longest 96 || return 1
    "$orbit" bench "$model" --device cuda:0 --host-layers "$layers" --only decode,train --context 128 \
        --decode-batches 1,16 --train-length 256 --train-tokens 1024 || return 1
    folder=$(mktemp -d)
    for kind in lora oft; do
        local train=("$orbit" train examples/demo/run.toml --set model="$model" --set device=cuda:0 --set data.eval=
            --set adapter.kind="$kind" --set adapter.block_size=16 --set train.steps=4 --set rollout.max_tokens=24
            --set reward.name=regex --set 'reward.pattern=[a-c1]')
        "${train[@]}" --set moe.host_layers=0 --run "$folder/$kind-device" 2>/dev/null || return 1
        "${train[@]}" --set moe.host_layers="$layers" --run "$folder/$kind-host" 2>&1 | grep "host memory" || return 1
        cmp "$folder/$kind-device/adapter/adapter_model.safetensors" "$folder/$kind-host/adapter/adapter_model.safetensors" &&
            cmp "$folder/$kind-device/rollouts.jsonl" "$folder/$kind-host/rollouts.jsonl" || return 1
    done
    rm -rf "$folder"
}

demo() {
    local folder
    folder=$(mktemp -d)
    "$1" train examples/demo/run.toml --set device=cuda:0 --run "$folder/run" || return 1
    python3 - "$folder/run/summary.json" <<'PY' || return 1
import json, sys
s = json.load(open(sys.argv[1]))
print(s)
sys.exit(0 if s["accuracy_after"] >= 0.88 and s["parity_mismatches"] == 0 else 1)
PY
    rm -rf "$folder"
}

run_checks() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    local bin=build-cuda
    if [[ -d "$carry" ]]; then
        bin=$carry
        [[ -f "$bin/orbit" ]] || tar xf "$bin/all.tar.xz" -C "$bin"
        export LD_LIBRARY_PATH="$PWD/$carry/lib:${LD_LIBRARY_PATH:-}"
        models=("models/mini-qwen3-int4" "$carry"/models/*)
    else
        ./run cuda
    fi
    check "opcheck" opcheck_in_parts "$bin/opcheck"
    local model
    for model in "${models[@]}"; do
        [[ -d "$model" ]] || continue
        check "parity $(basename "$model")" "$bin/orbit" parity "$model" --device cuda:0
        check "verify $(basename "$model")" verify_beside_cpu "$bin/orbit" "$model"
    done
    check "parity of the Qwen3-0.6B shape, texts up to 4,096 tokens" \
        "$bin/orbit" parity --shape qwen3-0.6b --longest 4096 --texts 8 --device cuda:0
    for model in "${models[@]}"; do
        [[ -d "$model" && "$model" == *qwen3-moe* ]] || continue
        check "experts in host memory: $(basename "$model")" host_experts "$bin/orbit" "$model" 2
    done
    check "demo on the GPU" demo "$bin/orbit"
    check "equal bits: repeated, offloaded, recomputed, killed and resumed" same_bits "$bin/orbit"
    printf '%d passed, %d failed\n' "$passed" "$failed"
    [[ $failed == 0 ]]
}

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    run_checks
else
    pack
fi
