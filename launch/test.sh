#!/usr/bin/env bash
# Runs the tests on the CPU, in an environment of their own.
#
#   bash launch/test.sh                            everything but the slow tests, in two processes
#   bash launch/test.sh tests/diffusion -k euler   arguments go to pytest, which then runs in one
#   bash launch/test.sh --soak                     kills, stops, starves and damages real runs, for an hour or more
#   bash launch/test.sh --install_only             only makes the environment
#
# PYTHON=...               the interpreter to make the environment with
# DIT_JAX_TEST_EXTRAS=...  more extras to install, such as "torch" for the tests that compare with torch
# DIT_JAX_VENV=...         the folder of the environment, .venv-test otherwise
#
# The soak is tests/soak (50 kills, 30 signals, 10 that come twice, a disk that is filled, 62 damaged checkpoints) and
# tests/hostile with 100 times the examples, which is what DIT_JAX_SOAK=1 says. --soak takes arguments of pytest too, as
# in --soak -k kills. A disk can only be filled as root, who may mount a small one; it is skipped otherwise.
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
  if [ $# = 0 ]; then
    set -- tests/soak tests/hostile
  fi
  export DIT_JAX_SOAK=1
  set -- -m "not slow" "$@"
elif [ $# = 0 ]; then
  # a file shares its compiled functions and runs, so it stays in one process; in their order, as else the long files of
  # one test come last and one process waits for the other
  set -- -n 2 --dist loadfile --no-loadscope-reorder
fi
JAX_PLATFORMS=cpu exec "$venv/bin/python" -m pytest "$@"
