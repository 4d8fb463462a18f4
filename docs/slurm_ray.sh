#!/usr/bin/env bash
#SBATCH --job-name=run-recipe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#
# sbatch docs/slurm_ray.sh recipes/pocket_grid.yaml [options of run-recipe]
#
# Starts a Ray cluster inside the allocation, one Ray node on each of its machines, and runs a recipe on it. Submit it
# from a folder that all machines see under the same path, with the project's environment active; results go to ./runs
# there. When the time is up Slurm ends the job; the same line goes on from the last checkpoints.
set -euo pipefail

port=${RAY_PORT:-6379}
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${machines[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
export RAY_ADDRESS=$address:$port RAY_USAGE_STATS_ENABLED=0
trap 'kill $(jobs -p) 2>/dev/null || true; wait || true' EXIT

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port="$port" --num-cpus="$cpus" --num-gpus="$gpus" \
  --include-dashboard=false --block &
for _ in {1..60}; do (: < "/dev/tcp/$address/$port") 2>/dev/null && break || sleep 1; done
for machine in "${machines[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$machine" \
    ray start --address="$RAY_ADDRESS" --num-cpus="$cpus" --num-gpus="$gpus" --block &
done

python - "${#machines[@]}" <<'WAIT'
import sys, time, ray

wanted, until = int(sys.argv[1]), time.monotonic() + 300
while True:
    try:
        ray.init(log_to_driver=False, logging_level="ERROR")
        here = sum(node["Alive"] for node in ray.nodes())
        ray.shutdown()
    except (ConnectionError, RuntimeError, ValueError):
        here = 0
    if here >= wanted:
        break
    if time.monotonic() > until:
        sys.exit(f"only {here} of {wanted} machines joined the Ray cluster within 300 s")
    time.sleep(2)
WAIT

run-recipe "$@" --executor ray
