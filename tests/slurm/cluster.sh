#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, for the tests: its own munged, slurmctld and two slurmd in one folder.
# Nothing of a Slurm that is installed here already is read or changed. Every call may be repeated.
#
#   tests/slurm/cluster.sh start      install Debian's slurm-wlm and munge where they are missing, start what is not up
#   tests/slurm/cluster.sh stop       end jobs and daemons, leave the folder with its logs
#   tests/slurm/cluster.sh status     exit status 0: both nodes answer
#   tests/slurm/cluster.sh with CMD   start, run CMD (which finds out by itself whether the cluster is up), stop
#   tests/slurm/cluster.sh env        lines for `eval` that point srun, sbatch ... to this cluster
#
# Exit status 77 of `start`: this machine cannot run it, the reason is on stderr.
#
# Environment:
#   EMOE_TEST_SLURM   the folder (default: /tmp/emoe-slurm)
set -euo pipefail

DIR=${EMOE_TEST_SLURM:-/tmp/emoe-slurm}
export SLURM_CONF=$DIR/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin

say() { echo "test cluster: $*" >&2; }
cannot() { say "cannot run here: $*"; exit 77; }

install() {
  local missing=()
  type -P slurmctld slurmd srun >/dev/null || missing+=(slurm-wlm)
  type -P munged >/dev/null || missing+=(munge)
  [ "$(id -u)" = 0 ] || cannot "the daemons need root"
  [ ${#missing[@]} -gt 0 ] || return 0
  type -P apt-get >/dev/null || cannot "${missing[*]} not installed, and there is no apt-get"
  say "installing ${missing[*]}"
  mkdir -p "$DIR"
  # The packages would start daemons of their own; a policy file tells them not to.
  local policy=/usr/sbin/policy-rc.d made=""
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; made=yes; }
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
    >"$DIR/apt.log" 2>&1 || { [ -z "$made" ] || rm -f $policy; cannot "apt-get failed, see $DIR/apt.log"; }
  [ -z "$made" ] || rm -f $policy
}

# cred_expire: a requeued job waits until its old credentials are worthless, two minutes by default.
# Proctrack by ancestry and no task plugin: neither asks for control groups, which a container may lack.
configure() {
  mkdir -p "$DIR"/{state,spool,log,run}
  chmod 755 "$DIR" "$DIR"/*/
  [ -s "$DIR/munge.key" ] || head -c 1024 /dev/urandom >"$DIR/munge.key"
  chmod 600 "$DIR/munge.key"
  touch "$DIR"/gpu{0..7}  # stand for eight GPUs a node, so that the scripts' --gpus-per-node=8 is granted
  echo "NodeName=n[1-2] Name=gpu File=$DIR/gpu[0-7]" >"$DIR/gres.conf"
  cat >"$SLURM_CONF" <<END
ClusterName=emoe-test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/%n.log
SlurmdDebug=debug2
SlurmctldDebug=debug
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=1,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
SlurmdTimeout=20
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=16818 CPUs=2 RealMemory=2000 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=16819 CPUs=2 RealMemory=2000 Gres=gpu:8 State=UNKNOWN
PartitionName=batch Nodes=n1,n2 Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=graceful Nodes=n1,n2 PriorityTier=1 GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
END
}

alive() { [ -s "$DIR/run/$1.pid" ] && kill -0 "$(cat "$DIR/run/$1.pid" 2>/dev/null)" 2>/dev/null; }

start_daemons() {
  alive munged || { rm -f "$DIR/run/munge.socket"*; munged --force --key-file "$DIR/munge.key" \
    --socket "$DIR/run/munge.socket" --pid-file "$DIR/run/munged.pid" --log-file "$DIR/log/munged.log" \
    --seed-file "$DIR/munge.seed"; }
  alive slurmctld || slurmctld
  local node
  for node in n1 n2; do
    mkdir -p "$DIR/spool/$node"
    alive $node || slurmd -N $node
  done
}

both_answer() {
  [ "$(sinfo -h -N -p batch -o '%N %T' 2>/dev/null | grep -cE ' (idle|mixed|allocated|completing)$')" = 2 ]
}

await_nodes() {
  local second
  for second in $(seq 60); do
    both_answer && return 0
    [ "$second" != 10 ] || scontrol update nodename=n[1-2] state=resume 2>/dev/null || true
    sleep 1
  done
  cannot "the nodes do not come up, see $DIR/log ($(sinfo -h -N -o '%N %T' 2>&1 | tr '\n' ' '))"
}

stop() {
  local name
  alive slurmctld && scancel --quiet --full --signal=KILL --user=root 2>/dev/null || true
  alive slurmctld && scancel --quiet --user=root 2>/dev/null || true
  for name in n1 n2 slurmctld munged; do
    alive $name || continue
    kill "$(cat "$DIR/run/$name.pid")"
    for _ in $(seq 50); do alive $name || break; sleep 0.2; done
    ! alive $name || kill -KILL "$(cat "$DIR/run/$name.pid")" 2>/dev/null || true
  done
}

start() {
  install
  both_answer || { configure; start_daemons; await_nodes; }
}

with() {
  local status=0
  (start) || status=$?
  [ $status = 0 ] || [ $status = 77 ] || exit $status
  trap stop EXIT
  "$@"
}

case ${1:-} in
  start) start ;;
  with) shift; with "$@" ;;
  stop) stop ;;
  status) alive slurmctld && both_answer ;; # Slurm itself waits ten seconds for a controller that is not there
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  *) say "start, stop, status, with or env"; exit 2 ;;
esac
