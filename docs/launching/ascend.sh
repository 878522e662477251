#!/bin/bash
# bash docs/launching/ascend.sh NODES NODE_RANK FIRST --config ...: on every node, with its own number from 0 on.
# FIRST is the address of node 0. Has never run on Ascend hardware.
set -euo pipefail
nodes=$1 rank=$2 first=$3
shift 3
source "${ASCEND_TOOLKIT_HOME:-/usr/local/Ascend/ascend-toolkit}/set_env.sh"
source .venv/bin/activate

# The ranks meet through torchrun and exchange their addresses there: no rank table.
unset RANK_TABLE_FILE
export HCCL_WHITELIST_DISABLE=1
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200} # seconds; nodes load CANN at different speeds
# export HCCL_SOCKET_IFNAME=eth0  # the interface of the host network, if HCCL takes the wrong one

exec torchrun --nnodes "$nodes" --node-rank "$rank" --nproc-per-node "${NPUS:-8}" \
    --master-addr "$first" --master-port 29500 launch/train.py "$@"
