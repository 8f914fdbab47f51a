#!/usr/bin/env bash
# What srun starts once on every node: the site's data staging, then torchrun with this node's ranks.
# Arguments: the flags of pretrain_emoe.py. Settings come exported from job.sh.
set -uo pipefail

# Slurm signals every process of a step. This shell remembers it (job.sh must tell a run that was told to stop from one
# that is done); torchrun and all that it starts begin with the signals ignored, so that nothing dies of them, and the
# ranks put their own handlers in place.
mark=$EMOE_LOGS/signalled
note_signals() {
  trap 'echo USR1 >>"$mark"' USR1
  trap 'echo TERM >>"$mark"' TERM
}
note_signals

source "$EMOE_HOME/slurm/words.sh"
say() { echo "node.sh on ${SLURMD_NODENAME:-$(hostname)}: $*" >&2; }

here=$EMOE_LOGS/node$SLURM_NODEID
mkdir -p "$here" || { say "error: EMOE_LOGS $EMOE_LOGS: cannot be written"; exit 1; }

environment() {
  export PYTHONPATH=$EMOE_HOME${PYTHONPATH:+:$PYTHONPATH}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # the ranks of a node share its cores
  export PYTHONFAULTHANDLER=1                    # a crash in compiled code says where, in the rank's log
  [ "$EMOE_GPUS_PER_NODE" != 0 ] || return 0
  # Kernels start in the order they are issued: Megatron's overlap of tensor-parallel communication counts on it.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # With a drawn k the buffers of experts change size from step to step; fixed segments would fragment.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  # A rank whose peer is gone ends itself instead of waiting in a collective.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
  # Errors of the network, and nothing else, in the log.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
}

# Sets inside: what a command runs inside the container with; nothing without one. Under pyxis this script is inside
# already. apptainer starts its command with the signals at their defaults: they are ignored anew there.
enter_container() {
  inside=()
  [ -n "$EMOE_CONTAINER" ] && [ "$EMOE_CONTAINER_KIND" = apptainer ] || return 0
  inside=(apptainer exec --nv --bind "$EMOE_HOME,$EMOE_SAVE,$EMOE_LOGS${EMOE_MOUNTS:+,$EMOE_MOUNTS}" "$EMOE_CONTAINER"
    bash -c 'trap "" USR1 TERM; exec "$@"' bash)
}

# Sets launcher. Its own handler of SIGTERM would end the ranks, and kill them 30 seconds later in the midst of a save.
make_launcher() {
  local last=$((EMOE_PROCS_PER_NODE - 1)) address
  address=$(scontrol show node "$SLURMD_NODENAME" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  launcher=(${inside[@]+"${inside[@]}"} "$EMOE_PYTHON" -m torch.distributed.run
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$EMOE_PROCS_PER_NODE"
    --rdzv-backend=c10d --rdzv-endpoint="$EMOE_RDZV_ADDRESS:$EMOE_RDZV_PORT" --rdzv-id="$EMOE_RUN_ID"
    --rdzv-conf="is_host=$((SLURM_NODEID == 0))" --max-restarts=0 ${address:+--local-addr="$address"}
    --log-dir="$here" --redirects=3 --tee="$([ $last = 0 ] || echo 0:3,)$last:3")
  export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
  ! has_signals_flag || launcher+=(--signals-to-handle=$TORCHELASTIC_SIGNALS_TO_HANDLE)
}

# Newer versions of torchrun have a flag for what older ones read from the environment, and overwrite that.
has_signals_flag() {
  ${inside[@]+"${inside[@]}"} "$EMOE_PYTHON" -c '
import importlib.util, pathlib, sys
torch = pathlib.Path(importlib.util.find_spec("torch").origin).parent
sys.exit("--signals-to-handle" not in (torch / "distributed" / "run.py").read_text())'
}

# The ranks of this node and what they have forked, whoever their parent is now: Slurm without control groups does not
# find the process that a killed rank left writing.
end_ranks() {
  local environment pid
  for environment in /proc/[0-9]*/environ; do
    grep -qsxz "TORCHELASTIC_RUN_ID=$EMOE_RUN_ID" "$environment" || continue
    pid=${environment#/proc/}
    ! grep -qsxz "SLURM_NODEID=$SLURM_NODEID" "$environment" || kill -KILL "${pid%/environ}" 2>/dev/null
  done
}

# Runs torchrun with the signals ignored; its messages also go to a file, from which the first failed rank is read.
# When another node has failed, this node's ranks are ended, which would wait for the lost ones. (srun's
# --kill-on-bad-exit would do that too, but Slurm sends what a node did not answer again a minute later, and so to the
# requeued job's step, whose number is the same.)
launch() {
  local words
  split EMOE_DATA
  [ "$EMOE_DATA" = none ] || set -- --data-path "${words[@]}" "$@"
  (
    trap '' USR1 TERM
    "${launcher[@]}" "$EMOE_HOME/pretrain_emoe.py" "$@" 2> >(tee -a "$here/torchrun.log" >&2)
  ) &
  torchrun=$!
  while kill -0 $torchrun 2>/dev/null; do
    [ ! -e "$EMOE_LOGS/first_failure" ] || end_ranks # each time: torchrun may be starting them only now
    sleep 2 >/dev/null 2>&1 & # it may outlive this script, whose streams somebody waits for
    wait -n $torchrun $! 2>/dev/null
  done
  wait $torchrun
}

# The first of all nodes to get here says which rank failed first and how its log ends.
report_failure() {
  local rank local_rank log
  local find_rank='/Root Cause/ {seen = 1} seen && $1 == "rank" {gsub(/[^0-9 ]/, ""); print $1, $2; exit}'
  read -r rank local_rank < <(awk "$find_rank" "$here/torchrun.log")
  log=$(ls -t "$here"/*/attempt_0/"${local_rank:-x}"/stderr.log 2>/dev/null | head -n 1)
  set -o noclobber
  {
    echo "rank ${rank:-unknown} on node ${SLURMD_NODENAME:-$SLURM_NODEID}, log ${log:-$here/torchrun.log}; its end:"
    tail -n 25 "${log:-$here/torchrun.log}"
    grep -A 7 'Root Cause' "$here/torchrun.log"
  } 2>/dev/null >"$EMOE_LOGS/first_failure" || true
}

# What the site's file does runs with the signals ignored as well, its copies would die of them.
stage() {
  [ -n "$EMOE_STAGE" ] || return 0
  trap '' USR1 TERM
  source "$EMOE_STAGE"
  local status=$?
  note_signals
  [ $status = 0 ] ||
    say "error: EMOE_STAGE $EMOE_STAGE ended with status $status" 2>&1 | tee -a "$here/torchrun.log" >&2
  return $status
}

environment
enter_container
stage && make_launcher && launch "$@"
status=$?
end_ranks
[ $status = 0 ] || report_failure
exit $status
