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
#   PIP_..., UV_...    as pip and uv know them. Where uv is on PATH it installs, in a third of pip's time, from what pip's
#                      settings and configuration files name; pip does where uv has no counterpart of one, or fails.
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

# Sets uv up as pip is configured. Fails, and says why, where it has to be pip.
prepare_uv() {
  local found line
  type -P uv >/dev/null || return 1
  if ! found=$("$VENV/bin/python" -m pip config list | "$VENV/bin/python" tools/uv_settings.py 2>&1); then
    say "pip installs, not uv: ${found:-its settings cannot be listed}"
    return 1
  fi
  while IFS= read -r line; do [ -z "$line" ] || export "${line?}"; done <<<"$found"
}

# Install with uv where it is prepared, else, or where it fails, with pip. TORCH_INDEX: another index for this call.
install_packages() {
  local index=()
  if [ $with_uv = yes ]; then
    [ -z "$TORCH_INDEX" ] || index=(--default-index "$TORCH_INDEX")
    # To pip all its indexes are one; uv would take a package from the first one that knows its name, or not at all.
    uv pip install -q --python "$VENV/bin/python" --index-strategy unsafe-best-match "$@" ${index[@]+"${index[@]}"} && return
    say "uv could not install $* (its message is above): pip tries"
    with_uv=no
  fi
  [ -z "$TORCH_INDEX" ] || index=(--index-url "$TORCH_INDEX")
  pip_install "$@" ${index[@]+"${index[@]}"}
}

# pip without its chatter: errors and the exit status come through, remarks on unused index settings do not.
# Byte code of all modules would be a third of its time, and few are ever imported (see first_import).
pip_install() {
  local status=0
  {
    "$VENV/bin/python" -m pip install -q --no-compile --progress-bar off --disable-pip-version-check --no-input "$@" 2>&1 >&3 |
      awk '!/Location .* is ignored/' >&2
    status=${PIPESTATUS[0]}
  } 3>&1 || true
  [ "$status" -eq 0 ] || die "pip could not install $* (exit status $status, its message is above)"
}

# The first import writes the byte code of what programs import, also where the environment says that no import should:
# every start would compile it anew. And it shows that the environment works.
first_import() {
  local told
  told=$(unset PYTHONDONTWRITEBYTECODE && TORCHDYNAMO_DISABLE=1 "$VENV/bin/python" -W ignore \
    -c "import megatron_emoe.sweep.tail_fit, megatron_emoe.training.loop" 2>&1) ||
    die "what was installed in $VENV cannot be imported: ${told##*$'\n'}"
  compile_large_packages
}

# What is imported later than that, each in a process of its own, from packages that are large.
compile_large_packages() {
  local folder name
  for name in torch megatron transformers lm_eval; do
    for folder in "$VENV"/lib/python3.*/site-packages/"$name"; do
      if [ -d "$folder" ]; then "$VENV/bin/python" -W ignore -m compileall -q -j 0 "$folder" >/dev/null 2>&1 || true; fi
    done
  done
}

install() {
  local action=$1 torch with_uv=no started=$SECONDS
  torch=$(sed -n 's/^ *"\(torch[<>=][^"]*\)",$/\1/p' setup.py)
  if [ "$action" = update ]; then
    echo $$ >"$UNFINISHED"
    rm -f "$STAMP"
  else
    rm -rf "$VENV"
    require_disk
    mkdir -p "$VENV"
    echo $$ >"$UNFINISHED"
    say "1/4 making $VENV with ${python% *} (Python ${python##* })"
    "${python% *}" -m venv "$VENV"
  fi
  if prepare_uv; then with_uv=yes; fi
  say "2/4 $torch and the libraries it needs (the first time about 3 GB to download, one to five minutes)"
  TORCH_INDEX=${EMOE_TORCH_INDEX:-} install_packages "$torch"
  say "3/4 this package and its other dependencies (the first time one to three minutes)"
  TORCH_INDEX="" install_packages -e ".[dev]"
  say "4/4 the first import (half a minute)"
  first_import
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
