#!/usr/bin/env bash
# A template for SLURM: any script that takes part in a run folder, or a training, on the GPUs of one or several nodes.
#   bash scripts/slurm.sh --help
#   sbatch --nodes 1 --gpus-per-node 4 scripts/slurm.sh main_results/classify_vlm.py --model llava-1.5-13b --benchmark imagenet
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh training_analysis/finetune_vlm.py --model llava-1.5-7b --benchmark flowers
# Lines with #SBATCH are defaults, which options of sbatch replace: set your partition and account there. One task per node
# starts scripts/multi_gpu.sh; the nodes need a shared disk for the project, OUTPUTS and HF_HOME. docs/cluster.md has more.
#SBATCH --job-name=vlmclassifier
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=96G
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help|)$ ]]; then sed -n '2,/^set/{/^# /s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
gpus=${SLURM_GPUS_ON_NODE:-1}
export MACHINES=${SLURM_JOB_NUM_NODES:-1} PORT=${PORT:-29500}
export PROCESSES=$(( gpus * MACHINES )) HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}  # nodes often have no network
HEAD=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" 2>/dev/null | head -n 1 || hostname)
export HEAD
exec srun --kill-on-bad-exit=1 bash -c 'RANK_OF_MACHINE=$SLURM_NODEID exec bash scripts/multi_gpu.sh "$@"' launcher "$@"
