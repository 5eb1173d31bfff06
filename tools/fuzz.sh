#!/usr/bin/env bash
# ./run fuzz [TARGET] [SECONDS]: without a target, each for SECONDS (default 30). Finds stay in build-fuzz/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
targets=(config tokenizer template peft safetensors gguf data)
[[ -n "${1:-}" && "$1" != all ]] && targets=("$1")
seconds=${2:-30}
cmake --preset fuzz >&2
cmake --build --preset fuzz --target fuzz_parsers >&2

declare -A seeds=(
    [config]=examples/demo/run.toml [tokenizer]=models/mini-qwen3-int4/tokenizer.json
    [template]=models/mini-qwen3-int4/chat_template.jinja [peft]=models/mini-qwen3-int4/oft/adapter_config.json
    [safetensors]=tests/models/tiny-qwen2/oft/adapter_model.safetensors [data]=examples/demo/test.jsonl
)
passed=0
for target in "${targets[@]}"; do
    corpus=build-fuzz/corpus-$target
    mkdir -p "$corpus"
    [[ -n "${seeds[$target]:-}" ]] && cp "${seeds[$target]}" "$corpus/"
    echo "== $target, $seconds s"
    ORBIT_FUZZ_TARGET=$target ASAN_OPTIONS=allocator_may_return_null=0 build-fuzz/fuzz_parsers "$corpus" \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 -print_final_stats=0 \
        -artifact_prefix="build-fuzz/$target-" 2>&1 | tail -n 3
    passed=$((passed + 1))
done
echo "$passed passed, 0 failed"
