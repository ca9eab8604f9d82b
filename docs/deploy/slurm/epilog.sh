#!/bin/sh
# Epilog of slurmd, run as root: end the mount of the job, also if a process still holds it.
directory=/run/tinkerfs/$SLURM_JOB_ID
# On SIGTERM the daemon unmounts and exits within 2 s; what still holds the mount gets ENOTCONN.
pkill -TERM -u "$SLURM_JOB_UID" -f -- "tinkerfs mount --serve $directory "
for _ in $(seq 50); do
    grep -q " $directory " /proc/self/mounts || break
    sleep 0.1
done
# A daemon that was killed leaves a mount behind.
if grep -q " $directory " /proc/self/mounts; then
    umount -l "$directory"
fi
rmdir "$directory" 2>/dev/null
exit 0
