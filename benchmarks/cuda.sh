#!/usr/bin/env bash
# Everything to be known of one NVIDIA GPU, for docs/benchmarks.md: the conformance suite, then tokens/s, MFU, memory
# and where the time goes for two shapes that fill 80 GB, beside other libraries.
#
#     benchmarks/cuda.sh [--dry] [folder]
#
# Tables and logs go into the folder (default: runs/bench-cuda); report.md is what to paste. PYTHON names the
# interpreter (.venv/bin/python), TORCHTITAN_PYTHON one that has torchtitan. --dry goes through it on the CPU at sizes
# that tell nothing. Ends with 2 where there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
DRY=
if [ "${1:-}" = --dry ]; then DRY=yes; shift; fi
FOLDER=${1:-runs/bench-cuda}

if [ -z "$DRY" ]; then
    "$PYTHON" - <<'PROBE' || exit 2
import sys
from backends import UserError, select
try:
    select("cuda")
except UserError as error:
    sys.exit(f"benchmarks/cuda.sh: {error}")
PROBE
fi
mkdir -p "$FOLDER"
REPORT=$FOLDER/report.md

if [ -n "$DRY" ]; then
    SUITE=(-k "float32 and usual and linear")
    SIZES=(--precision fp32 --sequence 16 --batch 1 --steps 1 --warmup 0 --threads 1 backend=cpu
        model.vocab_size=320 data.tokenizer.vocab_size=300 model.hidden_size=32 model.num_layers=2
        model.dense_hidden_size=64 model.attention.num_heads=2 model.attention.num_kv_heads=2
        model.moe.num_experts=4 model.moe.top_k=2 model.moe.expert_hidden_size=16)
    QWEN3=(model.attention.head_dim=16)
    DSV3=(model.attention.q_lora_rank=16 model.attention.kv_lora_rank=16 model.attention.qk_nope_head_dim=16
        model.attention.qk_rope_head_dim=16 model.attention.v_head_dim=16)
    PEERS=()
else
    export MOEBIUS_TEST_BACKEND=cuda
    SUITE=(-m "slow or not slow")
    SIZES=(--precision bf16 --sequence 4096 --batch 4 --steps 20 --warmup 5 backend=cuda)
    QWEN3=()
    DSV3=()
    PEERS=(--peer transformers --peer torchtitan --torchtitan-python "${TORCHTITAN_PYTHON:-$PYTHON}")
fi

echo "1/3 conformance suite ($FOLDER/conformance.log)"
"$PYTHON" -m pytest tests/backends/conformance "${SUITE[@]}" >"$FOLDER/conformance.log" 2>&1 || true
SUMMARY=$(tail -n 1 "$FOLDER/conformance.log")
echo "    $SUMMARY"
printf 'Conformance: %s\n' "$SUMMARY" >"$REPORT"

shape() { # number, name, then arguments
    local number=$1 name=$2
    shift 2
    echo "$number/3 configs/bench/$name.yaml ($FOLDER/$name.md)"
    "$PYTHON" benchmarks/step.py --config "configs/bench/$name.yaml" --markdown --profile "${PEERS[@]}" "${SIZES[@]}" \
        "$@" >"$FOLDER/$name.md" 2>"$FOLDER/$name.log" || { tail -n 5 "$FOLDER/$name.log" >&2; return 1; }
    printf '\n' >>"$REPORT"
    cat "$FOLDER/$name.md" >>"$REPORT"
}
shape 2 gpu-qwen3 "${QWEN3[@]}"
shape 3 gpu-dsv3 "${DSV3[@]}"
echo "written: $REPORT"
grep -q ' passed' <<<"$SUMMARY" && ! grep -q ' failed' <<<"$SUMMARY"
