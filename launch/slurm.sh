#!/usr/bin/env bash
# Trains on a Slurm cluster, one process for every GPU, and goes on where it stopped whenever Slurm gives it machines.
#
#   sbatch launch/slurm.sh --config=configs/xl.py --workdir=/shared/runs/xl
#   sbatch --nodes=4 --time=8:00:00 launch/slurm.sh ...      what stands below as #SBATCH is only where it begins
#
# Every argument goes to the training program. The workdir, the data and this folder lie where all nodes see them.
#
# DIT_JAX_VENV=...    the folder of the environment, .venv otherwise
#
#SBATCH --job-name=dit_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch, from the folder of dit_jax}"

srun "${DIT_JAX_VENV:-.venv}/bin/python" -m dit_jax.main --coordinator=auto "$@" &
step=$!

# Three minutes before the time is up, and with PreemptParameters=send_user_signal also when the job is preempted, this
# script is told; srun passes it on to every process. They finish the step, save it and end with 75.
told=
trap 'told=1; kill -USR1 "$step"' USR1 TERM

code=0
while
  told=
  wait "$step" && code=0 || code=$?
  [ -n "$told" ] # it was the signal that ended the waiting, not the step
do :; done

if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
