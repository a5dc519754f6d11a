#!/bin/sh
# Train the two checkpoints that ship with ssmlens and put them in their place. Usage: tools/train_packaged.sh [SSMLENS]
# Both at a time, one core each; resumes where it was interrupted.
set -eu
cd "$(dirname "$0")/.."
ssmlens=${1:-ssmlens}
train() { OMP_NUM_THREADS=1 "$ssmlens" train "configs/$1.toml" --out "runs/$1" --resume; }
train mamba-default &
other=$!
train mamba-polarized
wait "$other"
for name in mamba-default mamba-polarized; do
  mkdir -p "src/ssmlens/checkpoints/$name"
  cp "runs/$name/model/config.json" "runs/$name/model/model.safetensors" "src/ssmlens/checkpoints/$name/"
done
