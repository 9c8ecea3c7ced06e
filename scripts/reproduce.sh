#!/usr/bin/env bash
# Trains the zoo's CIFAR-100 networks, each beside its batch-norm twin, three seeds: starts or continues the whole list.
#
#   scripts/reproduce.sh                                    one after the other
#   JOBS=4 scripts/reproduce.sh precision=bf16              four side by side on one card, with a change to the recipe
#   DATA_DIR=/data/cifar100 scripts/reproduce.sh            with a copy of the data in place of the Hub's
#   MODELS="resnet20_cifar" SEEDS=0 scripts/reproduce.sh epochs=1 milestones=[]     one short pass
#
# Finished runs are left alone, so that the same command goes on after a stop. Results are in OUTPUT (default: output/),
# with what each run said in MODEL-seedN.log. It calls the active environment's python; paths count from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
models=${MODELS:-resnet164_cifar resnet20_cifar resnet56_cifar resnet110_cifar mobilenetv2_cifar resnext29_8x64d_cifar}
export OUTPUT=${OUTPUT:-output} DATA_DIR=${DATA_DIR:-}
mkdir -p "$OUTPUT"

run() {
    local model=$1 seed=$2
    shift 2
    echo "$model seed $seed: $(date -u +%H:%M)"
    python scripts/train.py --recipe zoo/recipes/cifar100_authors.yaml --resume --data-dir "$DATA_DIR" \
        --output-root "$OUTPUT" "model=$model" "seed=$seed" "$@" >>"$OUTPUT/$model-seed$seed.log" 2>&1 ||
        { echo "$model seed $seed stopped: $(tail -n 1 "$OUTPUT/$model-seed$seed.log"); see $OUTPUT/$model-seed$seed.log"; exit 1; }
}
export -f run

for seed in ${SEEDS:-0 1 2}; do
    for model in $models; do
        for norm in "" _iebn; do
            echo "$model$norm $seed"
        done
    done
done | xargs -P "${JOBS:-1}" -L 1 bash -c 'set -euo pipefail; run "${@: -2}" "${@:1:$#-2}"' run "$@"
