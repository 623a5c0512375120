#!/usr/bin/env bash
# A trainer on several machines of a Slurm cluster. It saves before its time is over or it is preempted, queues itself
# again, and goes on at its last checkpoint until all steps are done:
#   sbatch --nodes 4 examples/accelerate/slurm.sh train_omini.py --output_dir /shared/run ...
# With disks in the nodes alone, on the same nodes each time:
#   sbatch --nodes 2 --nodelist n1,n2 examples/accelerate/slurm.sh train_omini.py \
#     --save_on_each_node --output_dir /local/run ...
# Options after sbatch replace those below.
#SBATCH --job-name=flux
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
RDZV_PORT=${RDZV_PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-3}
SAVE_SECONDS=${SAVE_SECONDS:-240}
VENV=${VENV:-$PWD/.venv}

# else a torchrun that is started again waits for an address that only the first round is told
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# else srun gives torchrun and all its processes one core
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 "$VENV/bin/torchrun" \
  --nnodes "$SLURM_NNODES" --nproc_per_node "$GPUS_PER_NODE" \
  --rdzv_backend c10d --rdzv_endpoint "$first_node:$RDZV_PORT" --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --max_restarts "$MAX_RESTARTS" --shutdown_timeout "$SAVE_SECONDS" \
  "$@" --resume_from_checkpoint latest &
step=$!

# USR1 comes --signal seconds before the job's time is over; torchrun and the trainers take TERM and save
is_stopped=false
trap 'is_stopped=true; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1

# a signal ends `wait`, not the step
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
done
wait "$step"
code=$?

if "$is_stopped" && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
