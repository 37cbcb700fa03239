#!/usr/bin/env bash
# Runs scripts/train.sh, with the variables and flags set there, on several machines. There are two forms:
#
#   # torchrun: the same command on every machine, with NODE_RANK counting from 0
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 scripts/train_multinode.sh
#
#   # deepspeed: once, on the first machine, which starts the others with ssh and pdsh
#   HOSTFILE=hostfile scripts/train_multinode.sh   # one line per machine, such as: 10.0.0.1 slots=8
#
# Every machine needs this repository, its environment, the model and the data under the same paths, and OUTPUT_DIR on
# a shared disk. NCCL selects the network interface; if it selects the wrong one, set NCCL_SOCKET_IFNAME and
# NCCL_IB_HCA (with HOSTFILE: in a file named .deepspeed_env, which deepspeed passes to all machines).
#
# With torchrun, SIGTERM, SIGUSR1 or Ctrl-C on one machine saves a checkpoint and ends the run on all of them. With
# HOSTFILE the signal does not reach the processes behind ssh, and the run ends without a checkpoint.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$scripts/environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"

if [[ -n ${HOSTFILE:-} ]]; then
    [[ -z ${NNODES:-}${NODE_RANK:-} ]] ||
        fail "HOSTFILE=$HOSTFILE and NNODES=${NNODES:-} NODE_RANK=${NODE_RANK:-}: set one or the other, see the top of $0"
    [[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE: no such file; write one line per machine, such as: 10.0.0.1 slots=8"
    HOSTFILE=$(cd "$(dirname "$HOSTFILE")" && pwd)/$(basename "$HOSTFILE")
    machines=()
    while read -r line || [[ -n $line ]]; do
        [[ ! $line =~ ^[[:space:]]*(#|$) ]] || continue
        [[ $line != *$'\r' ]] || fail "HOSTFILE=$HOSTFILE: it has Windows line endings; run sed -i 's/\r$//' $HOSTFILE"
        [[ $line =~ ^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$ ]] ||
            fail "HOSTFILE=$HOSTFILE: cannot parse '$line'; expected a line such as: 10.0.0.1 slots=8"
        machine=${line%%[[:space:]]*}
        [[ " ${machines[*]-} " != *" $machine "* ]] || fail "HOSTFILE=$HOSTFILE: $machine is listed twice; merge the lines and add their slots"
        machines+=("$machine")
    done <"$HOSTFILE"
    ((${#machines[@]})) || fail "HOSTFILE=$HOSTFILE: lists no machine; write one line per machine, such as: 10.0.0.1 slots=8"
    command -v pdsh >/dev/null || fail "HOSTFILE=$HOSTFILE: deepspeed needs pdsh to start the other machines, and it is not installed"
    export HOSTFILE LAUNCHER=hostfile
else
    [[ ${NNODES:-} =~ ^[1-9][0-9]{0,4}$ ]] || fail "NNODES=${NNODES:-}: must be the number of machines; or set HOSTFILE"
    [[ ${NODE_RANK:-} =~ ^(0|[1-9][0-9]{0,4})$ ]] && ((NODE_RANK < NNODES)) ||
        fail "NODE_RANK=${NODE_RANK:-}: must be the index of this machine, from 0 to $((NNODES - 1))"
    [[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR is not set: it must be the address of the machine with NODE_RANK=0"
    [[ ${MASTER_PORT:=29500} =~ ^[1-9][0-9]{0,4}$ ]] && ((MASTER_PORT < 65536)) ||
        fail "MASTER_PORT=$MASTER_PORT: must be a free port of $MASTER_ADDR, the same on every machine"
    export NNODES NODE_RANK MASTER_ADDR MASTER_PORT LAUNCHER=torchrun
    echo "machine $((NODE_RANK + 1)) of $NNODES, rendezvous at $MASTER_ADDR:$MASTER_PORT"
fi
exec "$scripts/train.sh" "$@"
