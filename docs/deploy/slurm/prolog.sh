#!/bin/sh
# Prolog of slurmd, run as root: mount the account of the job's user at /run/tinkerfs/<job>.
# The key, the server and every option are those of the user: the login that `tinker auth login`
# stored, or ~/.config/tinkerfs/config.toml. The cache is the user's, and shared by the jobs on this
# node. It never fails, because Slurm drains a node whose prolog fails.
directory=/run/tinkerfs/$SLURM_JOB_ID
home=$(getent passwd "$SLURM_JOB_UID" | cut -d: -f6)
group=$(id -g "$SLURM_JOB_UID")
install -d -m 755 /run/tinkerfs
install -d -m 700 -o "$SLURM_JOB_UID" -g "$group" "$directory"
# tinkerfs detaches from Slurm's process group, and so outlives this script.
timeout 60 setpriv --reuid "$SLURM_JOB_UID" --regid "$group" --init-groups \
    env -i "HOME=$home" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    tinkerfs mount "$directory" 2>&1 | logger -t tinkerfs-prolog
exit 0
