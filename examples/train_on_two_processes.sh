#!/usr/bin/env bash
# The same training on two processes of this machine; with GPUs each process takes one.
# Usage: examples/train_on_two_processes.sh CONFIG.yaml FOLDER
set -euo pipefail
python -m torch.distributed.run --nproc_per_node=2 -m studio train image "$1" --folder "$2"
