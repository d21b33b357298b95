#!/bin/bash
# Train one recipe on one machine or several, without Slurm. Start it on every machine:
#   NODES=2 NODE_RANK=0 ADDRESS=10.0.0.1 bash launch/train.sh RECIPE [key=value ...]
# NODE_RANK counts from 0; ADDRESS is that of rank 0. All machines see recipe and run folder under the same path.
# TERM saves a checkpoint after the step. Exit code 0: the run has finished. 3: it was stopped, and the same command
# continues it. Any other: it failed.
set -u
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-python}"

"$python" -m ema_scale.slurm.torchrun --nnodes="${NODES:-1}" --nproc-per-node="${PROCESSES_PER_NODE:-gpu}" \
  --node-rank="${NODE_RANK:-0}" --master-addr="${ADDRESS:-127.0.0.1}" --master-port="${PORT:-29500}" \
  -m ema_scale.slurm.worker "$@" &
launcher=$!
told=
trap 'told=yes; kill -TERM "$launcher" 2>/dev/null' TERM INT
wait "$launcher"
code=$?
while [ -n "$told" ]; do # a signal ends a wait early
  told=
  wait "$launcher"
  now=$?
  [ "$now" -eq 127 ] || code=$now
done
[ "$code" -eq 0 ] || exit "$code"
exec "$python" -m ema_scale.slurm.finished "$@"
