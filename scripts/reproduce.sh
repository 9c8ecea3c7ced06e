#!/usr/bin/env bash
# Trains the zoo's CIFAR-100 networks with batch norm, IEBN and squeeze-and-excitation, three seeds each: starts or
# continues the whole list.
#
#   scripts/reproduce.sh                                    one after the other
#   JOBS=12 scripts/reproduce.sh precision=bf16 compile=true compile_mode=reduce-overhead
#                                                           twelve side by side on one card, with changes to the recipe
#                                                           (small networks want `nvidia-cuda-mps-control -d` first)
#   RECIPE=cifar100_modern MODELS=resnet164_cifar NORMS="- _iebn" scripts/reproduce.sh      by another recipe
#   DATA_DIR=/data/cifar100 scripts/reproduce.sh            with a copy of the data in place of the Hub's
#   MODELS="resnet20_cifar" SEEDS=0 scripts/reproduce.sh epochs=1 milestones=[]     one short pass
#
# Finished runs are left alone, so that the same command goes on after a stop. Results are in OUTPUT (default: output/),
# with what each run said in MODEL.RECIPE_seedN.txt; their table is printed at the end. It calls the active environment's
# python; paths count from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
models=${MODELS:-resnet164_cifar resnet20_cifar resnet56_cifar resnet110_cifar preresnet164_cifar mobilenetv2_cifar \
    densenet_bc_100_12_cifar resnext29_8x64d_cifar wrn_28_10_cifar}
norms=${NORMS:-- _iebn _se} # endings of the networks' names, - for none
export OUTPUT=${OUTPUT:-output} DATA_DIR=${DATA_DIR:-} RECIPE=${RECIPE:-cifar100_authors}
mkdir -p "$OUTPUT"

run() {
    local model=$1 seed=$2 log="$OUTPUT/$1.${RECIPE}_seed$2.txt"
    shift 2
    echo "$model seed $seed: $(date -u +%H:%M)"
    python scripts/train.py --recipe "zoo/recipes/$RECIPE.yaml" --resume \
        --output-root "$OUTPUT" "model=$model" "seed=$seed" "$@" >>"$log" 2>&1 ||
        { echo "$model seed $seed stopped: $(tail -n 1 "$log"); see $log"; exit 1; }
}
export -f run

set -m # runs in a process group of their own, so that a signal reaches all of them
for seed in ${SEEDS:-0 1 2}; do
    for model in $models; do
        for norm in $norms; do
            echo "$model${norm#-} $seed"
        done
    done
done | xargs -P "${JOBS:-1}" -L 1 bash -c 'set -euo pipefail; run "${@: -2}" "${@:1:$#-2}"' run "$@" &
trap 'kill -- "-$(jobs -p)"; exit 143' INT TERM
status=0
wait $! || status=$?
python scripts/update_zoo.py --table "$OUTPUT"
exit $status
