#!/usr/bin/env bash
# What is measured on the day a GPU is there, in at most ten minutes: its tests, the time of a training step, peak
# memory, and masks of SmolLM2 with thousands of steps.
#
#     bash benchmarks/gpu.sh               a CUDA device; SmolLM2-135M and posts in data/toxicity/posts/
#     SMALL=1 bash benchmarks/gpu.sh       the same parts on a CPU, with the shipped model
#
# Writes data/benchmarks/gpu/ (OUT): the output of each part, the masks, and gpu.json, which gathers all of it. A part
# that fails or has no time left is noted there, and the others run. The most important parts come first.
# Settings: PYTHON, OUT, SECONDS_IN_ALL (600), MODEL, ORDINARY (a text file), STEPS (of each mask), SEEDS.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-data/benchmarks/gpu}
LIMIT=${SECONDS_IN_ALL:-600}
if [ -n "${SMALL:-}" ]; then
    DEVICE=cpu MODEL=${MODEL:-tiny} STEPS=${STEPS:-4} SEEDS=${SEEDS:-0} ROUNDS=1 TEXTS=5
    SHAPE=(--shape tiny --batch 2 --length 8) SIZES=("2 x 8") SHAPES=(tiny)
else
    DEVICE=cuda MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M} STEPS=${STEPS:-2000} SEEDS=${SEEDS:-0 1 2} ROUNDS=30 TEXTS=500
    SHAPE=(--shape gpt2 --batch 32 --length 64) SIZES=("10 x 50" "32 x 64") SHAPES=(gpt2 gpt2-medium)
fi
mkdir -p "$OUT"
rm -f "$OUT"/*.txt "$OUT"/parts.tsv

part() { # name, command...: run a part with the time that is left, and note how it ended
    local name=$1 start=$SECONDS left=$((LIMIT - SECONDS))
    shift
    if [ "$left" -lt 5 ]; then
        printf '%s\t0\tno time left\n' "$name" >>"$OUT/parts.tsv"
        return
    fi
    if timeout "$left" "$@" >"$OUT/$name.txt" 2>&1; then end=done; else end="exit code $?"; fi
    printf '%s\t%s\t%s\n' "$name" "$((SECONDS - start))" "$end" >>"$OUT/parts.tsv"
    echo "$name: $end, $((SECONDS - start)) s"
}

step() { part "$1" "$PYTHON" benchmarks/step_time.py "${SHAPE[@]}" --rounds $ROUNDS --device $DEVICE --no-reference "${@:2}"; }

mask() { # name, options...: masks of 12, 50 and 200 edges, and their curve
    part "$1" "$PYTHON" toxicity/train_mask.py --model "$MODEL" --run "$1" --out "$OUT" --device $DEVICE \
        --steps "$STEPS" --max-edges 12 --budgets 12 50 200 --num-texts $TEXTS \
        ${ORDINARY:+--ordinary "$ORDINARY"} "${@:2}"
}

[ -n "${SMALL:-}" ] || part tests env TEST_GPU=1 "$PYTHON" -m pytest -m gpu
step step_float32
step step_split --split-qkv
step step_tf32 --tf32
step step_bfloat16 --dtype bfloat16
[ -n "${SMALL:-}" ] || step step_compiled --compile
part memory "$PYTHON" benchmarks/memory.py --shapes "${SHAPES[@]}" --sizes "${SIZES[@]}" --dtypes float32 \
    --gradient-checkpointing False --device $DEVICE --out "$OUT/memory.json"
part means "$PYTHON" toxicity/compute_means.py --model "$MODEL" --device $DEVICE --num-texts $TEXTS \
    --out "$OUT/means.safetensors" ${ORDINARY:+--ordinary "$ORDINARY"}
for seed in $SEEDS; do
    for method in ranking ugs; do
        mask "${method}_mean_seed$seed" --method $method --seed "$seed" --means "$OUT/means.safetensors"
        mask "${method}_learned_seed$seed" --method $method --seed "$seed" --means "$OUT/means.safetensors" \
            --constants-lr 0.02 --constants-loss objective --constants-steps "$((STEPS / 4))"
    done
done

"$PYTHON" - "$OUT" <<'END'
import csv, json, sys
from pathlib import Path

out = Path(sys.argv[1])
rows = csv.reader((out / "parts.tsv").open(), delimiter="\t")
found = {"parts": {name: {"seconds": int(seconds), "end": end} for name, seconds, end in rows}}
for name, part in found["parts"].items():
    log, curve = out / f"{name}.txt", out / name / "curve.json"
    part["output"] = log.read_text(errors="replace").splitlines()[-40:] if log.is_file() else []
    if curve.is_file() and part["end"] == "done":
        part["curve"] = json.loads(curve.read_text())
if (out / "memory.json").is_file():
    found["memory"] = json.loads((out / "memory.json").read_text())
(out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
print(f"written to {out / 'gpu.json'}")
END
