#!/usr/bin/env bash
# Build Transformer Engine into a folder of its own, for `make test-te`: the environment itself stays without it, as on
# a machine without a GPU. No GPU is needed to build it. When it is there already, a call prints nothing.
#
# It needs: the environment of tools/setup_env.sh with a torch built for CUDA 13 (pip's default; not the CPU-only
# wheels), g++ with C++17, about 2 GB of disk, and half an hour of one processor: 20 to 40 minutes on two cores.
#
# Environment:
#   VENV       the environment to build against (default: .venv)
#   TE         the folder to make (default: .te); TE/env.sh holds what a program needs to find it
#   MAX_JOBS   compilers at a time (default: 2; each takes up to 2 GB of memory)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME LD_LIBRARY_PATH

VERSION=2.20.2
# What it imports and the environment lacks; the rest of what it asks for serves other uses or is there.
IMPORTED=(einops==0.8.2 onnx==1.23.2 onnxscript==0.7.2 onnx_ir==1.1.0 ml_dtypes==0.6.0 nvdlfw-inspect==0.2.2)
VENV=$(realpath -m "${VENV:-.venv}")
TE=$(realpath -m "${TE:-.te}")
PYTHON=$VENV/bin/python
STAMP=$TE/ready # written last: what it was built from

say() { echo "set-up of Transformer Engine: $*" >&2; }
die() { say "$*"; exit 1; }

# pip without its chatter: errors and the exit status come through, remarks on unused index settings do not.
pip_install() {
  local status=0 quiet=(-q --progress-bar off --disable-pip-version-check --no-input)
  {
    "$PYTHON" -m pip install "${quiet[@]}" --no-deps --target "$TE" "$@" 2>&1 >&3 | awk '!/Location .* is ignored/' >&2
    status=${PIPESTATUS[0]}
  } 3>&1 || true
  [ "$status" -eq 0 ] || die "pip could not install $* (exit status $status, its message is above)"
}

join() { local IFS=:; echo "$*"; }

# The parts of CUDA 13 that torch's own packages bring, and those that this script adds beside them.
folders() { join "$SITE"/nvidia/{nccl,cudnn,cu13}/"$1" "$TE/nvidia/cu13/$1"; }

[ -x "$PYTHON" ] || die "there is no $PYTHON: make the environment first (make setup)"
read -r torch cuda SITE < <("$PYTHON" -c '
import sysconfig, torch
print(torch.__version__, torch.version.cuda or "none", sysconfig.get_paths()["purelib"])')
built_from="$VERSION torch $torch $VENV"
if [ -e "$STAMP" ] && [ "$(cat "$STAMP")" = "$built_from" ]; then exit 0; fi
case $cuda in
  13.*) ;;
  *) die "torch $torch of $VENV is built for CUDA $cuda, it must be 13 (unset EMOE_TORCH_INDEX and make setup again)" ;;
esac
type -P g++ >/dev/null || die "there is no g++ (Debian, Ubuntu: apt install g++)"
[ ! -e "$TE" ] || [ -e "$TE/env.sh" ] || [ -z "$(ls -A "$TE")" ] || die "$TE is there, but not made by this: remove it or set TE"

say "version $VERSION into $TE: 20 to 40 minutes on two cores"
started=$SECONDS
rm -rf "$TE"
mkdir -p "$TE"
cat >"$TE/env.sh" <<END
# source this: Transformer Engine $VERSION, for $PYTHON
export PYTHONPATH="$TE\${PYTHONPATH:+:\$PYTHONPATH}"
export LD_LIBRARY_PATH="$(folders lib)\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export CURAND_HOME="$TE/nvidia/cu13"
END
pip_install "nvidia-cuda-crt==$cuda.*" nvidia-curand setuptools wheel ninja pybind11 "${IMPORTED[@]}"
export PATH=$TE/bin:$VENV/bin:$PATH CPATH LIBRARY_PATH
CPATH=$(folders include) LIBRARY_PATH=$(folders lib)
source "$TE/env.sh"
export MAX_JOBS=${MAX_JOBS:-2} NVTE_FRAMEWORK=pytorch
pip_install --no-build-isolation transformer-engine{,-cu13,-torch}==$VERSION
"$PYTHON" -c "import transformer_engine.pytorch" || die "it is built, but does not import (the error is above)"
echo "$built_from" >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
say "done in $((SECONDS - started)) s, $TE takes $(du -sh "$TE" | cut -f 1)"
