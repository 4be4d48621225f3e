#!/usr/bin/env bash
# From a fresh clone to pictures that follow their prompts: installs dit_jax, trains the quickstart model on the
# shapes world, draws and scores prompts of seeds that it never saw. Run again, it resumes, or only draws and scores.
#
#   bash launch/quickstart.sh                    12 minutes on two CPU cores
#   bash launch/quickstart.sh --print_extra      only says which accelerator it would install for
#   bash launch/quickstart.sh --workdir=DIR --config.total_steps=500
#                                                every other argument goes to the training program
#
# PYTHON=...          the interpreter to make the environment with
# DIT_JAX_EXTRAS=...  the extras to install ("cuda12", "cuda12,wandb"; empty: CPU), whatever the machine has
# DIT_JAX_VENV=...    the folder of the environment, .venv otherwise
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

# --- What to install for: the newest CUDA that the driver and the card can run, else the CPU.

# ask_gpu FIELD: what nvidia-smi says of the first GPU that it lists; nothing if there is none.
ask_gpu() {
  nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1 || true
}

is_number() {
  case $1 in "" | *[!0-9]*) return 1 ;; esac
}

choose_extras() {
  local driver capability
  driver=$(ask_gpu driver_version)
  capability=$(ask_gpu compute_cap)
  if [ -n "${DIT_JAX_EXTRAS+set}" ]; then
    extras=$DIT_JAX_EXTRAS
    reason="DIT_JAX_EXTRAS says so"
  elif ! command -v nvidia-smi >/dev/null; then
    extras=""
    reason="there is no nvidia-smi"
  elif ! is_number "${driver%%.*}"; then
    extras=""
    reason="nvidia-smi names no driver version"
  elif [ "${driver%%.*}" -lt 525 ]; then
    extras=""
    reason="NVIDIA driver $driver is older than 525"
  elif [ "${driver%%.*}" -lt 580 ]; then
    extras="cuda12"
    reason="NVIDIA driver $driver is older than 580"
  elif is_number "${capability/./}" && [ "${capability/./}" -lt 75 ]; then
    extras="cuda12"
    reason="CUDA 13 has no code for a GPU of compute capability $capability"
  else
    extras="cuda13"
    reason="NVIDIA driver $driver is 580 or newer"
  fi
}

# --- The command line.

workdir=runs/quickstart
print_extra=false
train_arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h)
      { # the comment at the head of this file
        read -r _
        while IFS= read -r line && [[ $line == "#"* ]]; do echo "${line:2}"; done
      } <launch/quickstart.sh
      exit
      ;;
    --print_extra) print_extra=true ;;
    --workdir=*) workdir=${1#*=} ;;
    --workdir)
      if [ $# -eq 1 ]; then
        echo "--workdir needs a folder" >&2
        exit 2
      fi
      workdir=$2
      shift
      ;;
    --) ;;
    *) train_arguments+=("$1") ;;
  esac
  shift
done

choose_extras
if $print_extra; then
  echo "${extras:-cpu}"
  exit
fi

# --- Install.

echo "quickstart for ${extras:-cpu}: $reason"
venv=${DIT_JAX_VENV:-.venv}
install_into "$venv" "$extras"
device=()
case $extras in
  *cuda* | *tpu*) ;;
  *) device=(--allow_cpu) ;; # the choice was made above; do not stop where a GPU is left unused
esac

# On a CPU every step asks the system for its memory again. In huge pages (glibc of Linux; others do not read this) that
# is done far less often: docs/benchmarks.md.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# program NAME [ARGUMENT...]: runs one of the package's programs. (An empty array is unset to bash 3.2.)
program() {
  "$venv/bin/python" -m "dit_jax.$1" ${device[@]+"${device[@]}"} "${@:2}"
}

# --- Train, draw, score.

program main --config=configs/quickstart.py --workdir="$workdir" ${train_arguments[@]+"${train_arguments[@]}"}
program sample --model="$workdir" --prompts_file=launch/quickstart_prompts.txt --num_images=2 \
  --output="$workdir/pictures"
echo "pictures: $workdir/pictures/grid.png (two of each prompt in launch/quickstart_prompts.txt)"
program evaluate --model="$workdir" --metric=shapes # its last line is the score
