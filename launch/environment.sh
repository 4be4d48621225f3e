# shellcheck shell=bash
# Sourced by the scripts beside it: finds a Python and keeps a virtual environment with dit_jax in it.
# Works with the bash 3.2 of macOS.

# Nothing is compiled when it is installed: what a first start compiles must be kept, or every start does it again.
unset PYTHONDONTWRITEBYTECODE

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

# find_python: prints the interpreter to use: $PYTHON, or the first on PATH that is new enough.
find_python() {
  local candidate problem first_problem=""
  set -- python3 python3.13 python3.12 python3.14 python3.11 python
  if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
  fi
  for candidate in "$@"; do
    problem=$(why_not_python "$candidate")
    if [ -z "$problem" ]; then
      command -v "$candidate"
      return
    fi
    first_problem=${first_problem:-$problem}
  done
  fail "$first_problem (or name another interpreter: PYTHON=/path/to/python3 bash $0)"
}

# why_not_python INTERPRETER: prints nothing if it will do, else what is wrong and what to install.
why_not_python() {
  local version
  if ! version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
    echo "$1 does not run: install Python 3.11 to 3.14, for example: sudo apt install python3 python3-venv"
    return
  fi
  case $version in
    3.11 | 3.12 | 3.13 | 3.14) ;;
    *)
      echo "$1 is Python $version: install Python 3.11 to 3.14 with its venv module"
      return
      ;;
  esac
  # uv makes environments without either module
  if ! command -v uv >/dev/null && ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "Python $version has no venv module: install it, on Debian and Ubuntu: sudo apt install python$version-venv"
  fi
}

# install_into FOLDER EXTRAS: a virtual environment at FOLDER with this tree and its comma-separated extras.
# A stamp in the folder says what it was made for; as long as that holds, neither pip nor a network is needed.
install_into() {
  local folder=$1 extras=$2 stamp=$1/dit_jax_installed.txt wanted installed="" python
  wanted=$(printf '%s\n' "$extras" "$PWD" "$(cat setup.cfg pyproject.toml | cksum)")
  if [ -f "$stamp" ]; then
    installed=$(cat "$stamp")
  fi
  if [ "$installed" = "$wanted" ] && [ -x "$folder/bin/python" ]; then
    return
  fi
  if [ -n "$installed" ] && [ "${installed%%$'\n'*}" != "$extras" ]; then
    echo "$folder was made for '${installed%%$'\n'*}' and '$extras' is wanted now: making it anew"
    rm -r "$folder" # two CUDA plugins in one environment break each other
  fi
  if [ ! -x "$folder/bin/python" ]; then
    python=$(find_python)
    if command -v uv >/dev/null; then
      uv venv --quiet --python "$python" "$folder"
    else
      "$python" -m venv "$folder"
    fi
  fi
  echo "installing into $folder (once, a minute or more)"
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$folder/bin/python" --editable ".${extras:+[$extras]}"
  else # without compiling all of it ahead, as uv does: saves half of the time
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable ".${extras:+[$extras]}"
  fi
  printf '%s\n' "$wanted" >"$stamp"
}
