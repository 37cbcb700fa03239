#!/usr/bin/env bash
# scripts/train.sh on several machines: the same variables and flags, which are edited there. Two forms:
#
#   # the same command on every machine, NODE_RANK counting from 0 (torchrun):
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 scripts/train_multinode.sh
#
#   # once, on the first machine, which reaches the others by ssh and pdsh (deepspeed):
#   HOSTFILE=hostfile scripts/train_multinode.sh   # lines such as: 10.0.0.1 slots=8
#
# Every machine needs this folder, its environment, the model and the data under the same paths, and OUTPUT_DIR on
# a disk that all see. NCCL chooses its network itself; where it chooses wrongly, set NCCL_SOCKET_IFNAME and
# NCCL_IB_HCA, with HOSTFILE in a file .deepspeed_env, which deepspeed passes on.
#
# SIGTERM, SIGUSR1 or Ctrl-C on one machine of the first form ends the run on all of them, with a checkpoint. In the
# second form the processes are beyond ssh: there it ends them without one.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$scripts/environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"

if [[ -n ${HOSTFILE:-} ]]; then
    [[ -z ${NNODES:-}${NODE_RANK:-} ]] ||
        fail "HOSTFILE=$HOSTFILE and NNODES=${NNODES:-} NODE_RANK=${NODE_RANK:-}: one form or the other, see the top of $0"
    [[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE: no such file; a line for each machine, such as: 10.0.0.1 slots=8"
    HOSTFILE=$(cd "$(dirname "$HOSTFILE")" && pwd)/$(basename "$HOSTFILE")
    machines=()
    while read -r line || [[ -n $line ]]; do
        [[ ! $line =~ ^[[:space:]]*(#|$) ]] || continue
        [[ $line != *$'\r' ]] || fail "HOSTFILE=$HOSTFILE: its lines end as on Windows; run sed -i 's/\r$//' $HOSTFILE"
        [[ $line =~ ^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$ ]] ||
            fail "HOSTFILE=$HOSTFILE: '$line' is not of the form: 10.0.0.1 slots=8"
        machine=${line%%[[:space:]]*}
        [[ " ${machines[*]-} " != *" $machine "* ]] || fail "HOSTFILE=$HOSTFILE: $machine stands there twice; add up its slots"
        machines+=("$machine")
    done <"$HOSTFILE"
    ((${#machines[@]})) || fail "HOSTFILE=$HOSTFILE: names no machine; a line for each, such as: 10.0.0.1 slots=8"
    command -v pdsh >/dev/null || fail "HOSTFILE=$HOSTFILE: deepspeed starts the others with pdsh, which is not installed"
    export HOSTFILE LAUNCHER=hostfile
else
    [[ ${NNODES:-} =~ ^[1-9][0-9]{0,4}$ ]] || fail "NNODES=${NNODES:-}: how many machines there are; or give HOSTFILE"
    [[ ${NODE_RANK:-} =~ ^(0|[1-9][0-9]{0,4})$ ]] && ((NODE_RANK < NNODES)) ||
        fail "NODE_RANK=${NODE_RANK:-}: which of the $NNODES machines this is, from 0 to $((NNODES - 1))"
    [[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR is not set: the address of the machine with NODE_RANK=0"
    [[ ${MASTER_PORT:=29500} =~ ^[1-9][0-9]{0,4}$ ]] && ((MASTER_PORT < 65536)) ||
        fail "MASTER_PORT=$MASTER_PORT: a free port of $MASTER_ADDR, the same on every machine"
    export NNODES NODE_RANK MASTER_ADDR MASTER_PORT LAUNCHER=torchrun
    echo "machine $((NODE_RANK + 1)) of $NNODES, meeting at $MASTER_ADDR:$MASTER_PORT"
fi
exec "$scripts/train.sh" "$@"
