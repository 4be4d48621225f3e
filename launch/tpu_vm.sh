#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it, installs dit_jax on all of its machines, starts one process on each.
#
#   bash launch/tpu_vm.sh create  NAME --zone=ZONE --accelerator-type=v5litepod-16 \
#                                 --runtime-version=v2-alpha-tpuv5-lite --spot
#   bash launch/tpu_vm.sh install NAME --zone=ZONE     copies this tree and installs it; again after a change
#   bash launch/tpu_vm.sh train   NAME --zone=ZONE --workdir=gs://BUCKET/xl --config=configs/xl.py \
#                                 --config.data.source=hf:OWNER/NAME
#   bash launch/tpu_vm.sh logs    NAME --zone=ZONE     fetches the log of every machine into logs/NAME
#   bash launch/tpu_vm.sh stop    NAME --zone=ZONE     the run saves its step and ends
#   bash launch/tpu_vm.sh delete  NAME --zone=ZONE
#
# Without --zone it is gcloud's own (gcloud config set compute/zone ZONE). create waits until the slice is there, and
# hands its other arguments to gcloud; those of train go to the training program. The workdir is in a bucket, as the
# machines have no disk in common. After a preemption: delete, create, install, and the same train goes on.
set -euo pipefail

POLL=${DIT_JAX_POLL:-30} # seconds between two looks at the queue

fail() {
  printf 'tpu_vm.sh: %s\n' "$1" >&2
  exit 2
}

# on_all COMMAND [ARGUMENT...]: a command of the shell on every machine of the slice; arguments go to gcloud.
on_all() {
  gcloud compute tpus tpu-vm ssh "$name" ${zone[@]+"${zone[@]}"} --worker=all --command="$1" "${@:2}"
}

create() {
  gcloud compute tpus queued-resources create "$name" --node-id="$name" ${zone[@]+"${zone[@]}"} "$@"
  local state=""
  while [ "$state" != ACTIVE ]; do
    state=$(gcloud compute tpus queued-resources describe "$name" ${zone[@]+"${zone[@]}"} --format="value(state.state)")
    echo "$name: $state"
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDING | SUSPENDED) fail "$name is $state: delete it, and ask again" ;;
      *) sleep "$POLL" ;;
    esac
  done
}

# The machines' own Python may be older than dit_jax needs, so that uv brings one.
install() {
  tree=$(mktemp -d)
  trap 'rm -r "$tree"' EXIT
  tar -czf "$tree/dit_jax.tar.gz" -C "$(dirname "${BASH_SOURCE[0]}")/.." \
    setup.cfg pyproject.toml README.md LICENSE dit_jax configs launch
  gcloud compute tpus tpu-vm scp "$tree/dit_jax.tar.gz" "$name:" ${zone[@]+"${zone[@]}"} --worker=all
  # shellcheck disable=SC2016 # it is the machines that expand
  on_all 'set -e; export PATH="$HOME/.local/bin:$PATH"; python3 -m pip install --quiet --user uv
    mkdir -p dit_jax; tar -xzf dit_jax.tar.gz -C dit_jax; cd dit_jax; uv python install --quiet 3.12
    source launch/environment.sh; PYTHON=$(uv python find 3.12) install_into .venv tpu,gcs,hf'
}

# In the background: it goes on when the connection ends.
train() {
  on_all "cd dit_jax || exit; if kill -0 \$(cat train.pid) 2>/dev/null; then echo 'it trains already' >&2; exit 2; fi
    nohup .venv/bin/python -m dit_jax.main --coordinator=auto$(printf ' %q' "$@") >>train.log 2>&1 </dev/null &
    echo \$! >train.pid"
}

logs() {
  mkdir -p "logs/$name"
  on_all 'cat dit_jax/train.log' --output-directory="logs/$name"
}

# shellcheck disable=SC2016 # it is the machines that expand
stop() {
  on_all 'kill -TERM $(cat dit_jax/train.pid)'
}

delete() {
  gcloud compute tpus queued-resources delete "$name" ${zone[@]+"${zone[@]}"} --force --quiet
}

action=${1:-}
case $action in
  create | install | train | logs | stop | delete) ;;
  *) fail "'$action' is not create, install, train, logs, stop or delete" ;;
esac
name=${2:-}
case $name in
  "" | -*) fail "$action needs the NAME of a slice: bash launch/tpu_vm.sh $action NAME ..." ;;
esac
shift 2
zone=()
if [[ ${1:-} == --zone=* ]]; then
  zone=("$1")
  shift
fi
case $action in
  create | train) ;;
  *) [ $# = 0 ] || fail "$action takes no $1" ;;
esac
if [ "$action" = train ] && [[ " $* " != *" --workdir=gs://"* ]]; then
  fail "train needs --workdir=gs://BUCKET/FOLDER: the machines have no disk in common"
fi
command -v gcloud >/dev/null || fail "there is no gcloud: install the Google Cloud CLI, then run gcloud auth login"
"$action" "$@"
