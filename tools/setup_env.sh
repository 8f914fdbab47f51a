#!/usr/bin/env bash
# Make .venv with a Python 3.12 or 3.13 and install this package with its development tools. When nothing has changed
# since the last time, a call takes a fraction of a second and prints nothing.
#
#   tools/setup_env.sh [--dry-run]      --dry-run: say what would be done, change nothing
#
# Environment:
#   PYTHON             the interpreter to use (default: the first that works of python3.12, python3.13, python3 on
#                      PATH, pyenv's versions, uv's)
#   VENV               the folder to make (default: .venv)
#   EMOE_TORCH_INDEX   package index to take torch from, such as PyTorch's index of CPU-only wheels (default: pip's own)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME

VENV=${VENV:-.venv}
STAMP=$VENV/.emoe-ready          # written last: what the finished set-up was made from
UNFINISHED=$VENV/.emoe-unfinished # written first: the process that is at work, removed at the end
DRY_RUN=no
[ "${1:-}" = --dry-run ] && DRY_RUN=yes

say() { echo "set-up: $*" >&2; }
die() { say "$*"; exit 1; }

# Exit status 0: this is a Python 3.12 or 3.13 that can make environments. 3: only its venv module is missing.
usable() {
  "$1" -c '
import sys
if not (3, 12) <= sys.version_info[:2] < (3, 14): sys.exit(2)
try: import ensurepip, venv
except ImportError: sys.exit(3)' >/dev/null 2>&1
}

# "<path> <version>" of the interpreter itself, also when it is called through an environment or a link.
identity() {
  "$1" -c '
import os, platform, sys
print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)), platform.python_version())'
}

candidates() {
  local name version
  for name in python3.12 python3.13 python3 python; do type -P "$name" || true; done
  for version in 3.12 3.13; do
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version"*/bin/python 2>/dev/null || true
  done
  if type -P uv >/dev/null; then
    for version in 3.12 3.13; do uv python find "$version" 2>/dev/null || true; done
  fi
}

find_python() {
  local candidate status lacks_venv=""
  if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && { identity "$PYTHON"; return; }
    die "PYTHON=$PYTHON is not a Python 3.12 or 3.13 with the venv module ($("$PYTHON" --version 2>&1 | head -n 1))"
  fi
  while IFS= read -r candidate; do
    usable "$candidate" && status=0 || status=$?
    if [ $status -eq 0 ]; then identity "$candidate"; return; fi
    [ $status -ne 3 ] || lacks_venv=$candidate
  done < <(candidates)
  [ -z "$lacks_venv" ] || die "$lacks_venv has no venv module: install it (Debian, Ubuntu: apt install python3-venv)"
  die "no Python 3.12 or 3.13 found. Install one (Debian, Ubuntu: apt install python3.12 python3.12-venv; any system:" \
    "pyenv install 3.12, or uv python install 3.12) or name one: make PYTHON=/path/to/python3.12"
}

# The interpreter that PYTHON names, nothing where PYTHON is not set.
asked_python() { [ -z "${PYTHON:-}" ] || find_python; }
stamped() { sed -n "s/^$1=//p" "$STAMP" 2>/dev/null || true; }
setup_sum() { cksum <setup.py; }

# One word for what has to be done, and why.
plan() {
  local at_work
  if [ -e "$UNFINISHED" ]; then
    at_work=$(cat "$UNFINISHED")
    if kill -0 "$at_work" 2>/dev/null; then
      echo "wait: process $at_work is setting $VENV up; wait for it, or remove $VENV"
      return
    fi
    echo "recreate: an earlier set-up was interrupted"
  elif [ ! -e "$VENV" ]; then echo "create: there is no $VENV"
  elif [ ! -e "$STAMP" ]; then
    if usable "$VENV/bin/python"; then echo "update: $VENV was made by someone else"
    else echo "refuse: $VENV is there, but its bin/python is not a Python 3.12 or 3.13: remove it or set VENV"; fi
  elif ! "$VENV/bin/python" -c "" 2>/dev/null; then echo "recreate: $VENV/bin/python no longer runs"
  elif [ "$(stamped root)" != "$PWD" ]; then echo "recreate: $VENV was made for $(stamped root)"
  elif [ -n "$wanted" ] && [ "$(stamped python)" != "$wanted" ]; then
    echo "recreate: it was made with Python $(stamped python), PYTHON=$PYTHON"
  elif [ -n "${EMOE_TORCH_INDEX:-}" ] && [ "$(stamped torch_index)" != "$EMOE_TORCH_INDEX" ]; then
    echo "recreate: EMOE_TORCH_INDEX=$EMOE_TORCH_INDEX"
  elif [ "$(stamped setup)" != "$(setup_sum)" ]; then echo "update: setup.py has changed"
  else echo "none: $VENV is ready"; fi
}

require_disk() {
  local needed_gb=8 free_kb
  [ -z "${EMOE_TORCH_INDEX:-}" ] || needed_gb=3
  mkdir -p "$(dirname "$VENV")"
  free_kb=$(df -Pk "$(dirname "$VENV")" | awk 'NR == 2 {print $4}')
  [ "$free_kb" -ge $((needed_gb * 1000 * 1000)) ] ||
    die "$VENV needs $needed_gb GB of disk, $((free_kb / 1000000)) GB are free there: make room, or set VENV to a folder elsewhere"
}

# pip without its chatter: errors and the exit status come through, remarks on unused index settings do not.
pip_install() {
  local status=0
  {
    "$VENV/bin/python" -m pip install -q --progress-bar off --disable-pip-version-check --no-input "$@" 2>&1 >&3 |
      awk '!/Location .* is ignored/' >&2
    status=${PIPESTATUS[0]}
  } 3>&1 || true
  [ "$status" -eq 0 ] || die "pip could not install $* (exit status $status, its message is above)"
}

install() {
  local action=$1 torch started=$SECONDS
  torch=$(sed -n 's/^ *"\(torch[<>=][^"]*\)",$/\1/p' setup.py)
  if [ "$action" = update ]; then
    echo $$ >"$UNFINISHED"
    rm -f "$STAMP"
  else
    rm -rf "$VENV"
    require_disk
    mkdir -p "$VENV"
    echo $$ >"$UNFINISHED"
    say "1/3 making $VENV with ${python% *} (Python ${python##* })"
    "${python% *}" -m venv "$VENV"
  fi
  say "2/3 $torch and the libraries it needs (the first time about 3 GB to download, two to five minutes)"
  if [ -n "${EMOE_TORCH_INDEX:-}" ]; then pip_install "$torch" --index-url "$EMOE_TORCH_INDEX"; else pip_install "$torch"; fi
  say "3/3 this package and its other dependencies (the first time one to three minutes)"
  pip_install -e ".[dev]"
  printf 'setup=%s\nroot=%s\npython=%s\ntorch_index=%s\n' \
    "$(setup_sum)" "$PWD" "$python" "${EMOE_TORCH_INDEX:-}" >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"
  rm -f "$UNFINISHED"
  say "done in $((SECONDS - started)) s, $VENV takes $(du -sh "$VENV" | cut -f 1)"
}

wanted=$(asked_python)
decision=$(plan)
action=${decision%%:*}
python=""
case $action in
  none) [ $DRY_RUN = no ] || say "$decision"; exit 0 ;;
  wait | refuse) die "${decision#*: }" ;;
  update) python=$(stamped python); [ -n "$python" ] || python=$(identity "$VENV/bin/python") ;;
  *) python=$(find_python) ;;
esac
[ "$action" = create ] || say "${decision#*: }"
if [ $DRY_RUN = yes ]; then
  say "would $action $VENV with $python"
  exit 0
fi
trap 'say "not finished: the same command starts it over"; exit 130' INT TERM
install "$action"
