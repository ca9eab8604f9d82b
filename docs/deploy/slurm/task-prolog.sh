#!/bin/sh
# TaskProlog, run as the user: tell the job where the account is mounted.
directory=/run/tinkerfs/$SLURM_JOB_ID
if mountpoint -q "$directory"; then
    echo "export TINKER_MOUNT=$directory"
fi
