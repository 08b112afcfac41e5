#!/bin/sh
# A command that is started again while it ends with 75 (preempted), 76 (hung) or 77 (another process was lost):
#     sh docs/launch/restart.sh python -m train.pretrain --config llama3.1-8b --stage 1
# On one machine, or at once on every worker of a slice. At most MAX_RESTARTS times (50). Ctrl-C, which saves, ends it.
restarts=0
while :; do
    "$@"
    status=$?
    case $status in
        75 | 76 | 77) ;;
        *) exit "$status" ;;
    esac
    [ "$restarts" -lt "${MAX_RESTARTS:-50}" ] || exit "$status"
    restarts=$((restarts + 1))
    echo "status $status: starting again ($restarts)" >&2
done
