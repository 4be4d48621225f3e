#!/usr/bin/env bash
# Runs the tests on the CPU, in an environment of their own.
#
#   bash launch/test.sh                            everything but the slow tests, in two processes
#   bash launch/test.sh tests/diffusion -k euler   arguments go to pytest, which then runs in one
#   bash launch/test.sh --soak                     hurts real runs for an hour or more, and says what came of it
#   bash launch/test.sh --install_only             only makes the environment
#
# PYTHON=...               the interpreter to make the environment with
# DIT_JAX_TEST_EXTRAS=...  more extras to install, such as "torch" for the tests that compare with torch
# DIT_JAX_VENV=...         the folder of the environment, .venv-test otherwise
#
# The soak takes arguments of pytest too (--soak -k kills). Damage of disks needs root, who may mount a small one. It
# sets DIT_JAX_SOAK=1, with which any test that draws its cases at random draws more of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

venv=${DIT_JAX_VENV:-.venv-test}
install_into "$venv" "test${DIT_JAX_TEST_EXTRAS:+,$DIT_JAX_TEST_EXTRAS}"
if [ "${1:-}" = --install_only ]; then
  exit
fi
if [ "${1:-}" = --soak ]; then
  shift
  export DIT_JAX_SOAK=1
  set -- -m soak "$@"
elif [ $# = 0 ]; then
  set -- -n 2 --dist loadfile # a file shares its compiled functions and runs, so it stays in one process
fi
JAX_PLATFORMS=cpu exec "$venv/bin/python" -m pytest "$@"
