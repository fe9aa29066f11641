#!/usr/bin/env bash
# Run a classify script (or any script that takes part in a run folder) on several GPUs or CPU processes of this machine.
#   bash scripts/multi_gpu.sh main_results/classify_vlm.py --model llava-1.5-13b --benchmark imagenet
#   PROCESSES=2 bash scripts/multi_gpu.sh main_results/classify_clip.py --benchmark flowers
#   PROCESSES=8 MACHINES=2 RANK_OF_MACHINE=0 HEAD=node1 bash scripts/multi_gpu.sh main_results/classify_vlm.py ...
# Settings: PROCESSES (in all; without it one per GPU, else 2), MACHINES, RANK_OF_MACHINE, HEAD, PORT, PYTHON.
# The processes share the run folder, nothing else: docs/scaling.md. When one dies the launcher ends the others; no row is
# lost, and the same command goes on. The exit code is that of the process that failed first.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help|)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
root=$(cd "$(dirname "$0")/.." && pwd)
script=$1; shift
[ -f "$script" ] || script=$root/$script
[ -f "$script" ] || { echo "error: there is no script $script: name one such as main_results/classify_vlm.py" >&2; exit 1; }
PYTHON=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$(( gpus > 0 ? gpus * ${MACHINES:-1} : 2 ))}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "error: PROCESSES=$processes is not a number of processes: write 1 or more" >&2; exit 1
fi
if [ "${MACHINES:-1}" -gt 1 ] && [ -z "${HEAD:-}" ]; then
    echo "error: MACHINES=$MACHINES needs HEAD: the name or address of the machine whose RANK_OF_MACHINE is 0" >&2; exit 1
fi
if [ "$gpus" -eq 0 ]; then  # without this every process would take all cores
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / processes > 0 ? $(nproc) / processes : 1 ))}
fi
# --multi_gpu is accelerate's word for several processes, on CPUs too; it does not exist for a single one.
several=(); [ "$processes" -eq 1 ] || several=(--multi_gpu)
machines=(--num_machines "${MACHINES:-1}" --machine_rank "${RANK_OF_MACHINE:-0}")
[ -z "${HEAD:-}" ] || machines+=(--main_process_ip "$HEAD")
echo "Running $script with $processes processes on ${MACHINES:-1} machine(s), $gpus GPUs here" >&2
port=${PORT:-$([ "${MACHINES:-1}" -gt 1 ] && echo 29500 || echo 0)}  # 0: any free one; machines must agree on one
# accelerate launch, without its traceback: the script has printed one sentence with what is wrong.
exec "$PYTHON" -c '
import subprocess, sys
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    main()
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
except subprocess.CalledProcessError as error:
    code = error.returncode
else:
    code = 0
sys.exit(128 - code if code < 0 else code)
' "${several[@]}" --num_processes "$processes" "${machines[@]}" --main_process_port "$port" \
    --mixed_precision no --dynamo_backend no "$script" "$@"
