#!/usr/bin/env bash
# Runs the tests on the CPU, in an environment of their own.
#
#   bash launch/test.sh                          everything but the slow tests
#   bash launch/test.sh tests/diffusion -k euler every argument goes to pytest
#   bash launch/test.sh --install_only           only makes the environment
#
# PYTHON=...               the interpreter to make the environment with
# DIT_JAX_TEST_EXTRAS=...  more extras to install, such as "torch" for the tests that compare with torch
# DIT_JAX_VENV=...         the folder of the environment, .venv-test otherwise
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

venv=${DIT_JAX_VENV:-.venv-test}
install_into "$venv" "test${DIT_JAX_TEST_EXTRAS:+,$DIT_JAX_TEST_EXTRAS}"
if [ "${1:-}" = --install_only ]; then
  exit
fi
JAX_PLATFORMS=cpu exec "$venv/bin/python" -m pytest "$@"
