#!/bin/sh
# Boot systemd as process 1 of new namespaces, on a copy of this machine's files.
#   systemd_machine.sh WORK TARGET DIRECTORY...
# WORK is an empty directory. It gets the copy, an overlay in memory: changes end with the machine.
# Before the boot, the program WORK/prepare runs in the copy. TARGET is the unit to boot.
# DIRECTORIES are shown in the copy, even if they are on other file systems. Needs root.
# The machine has no network but its loopback interface, and ends with this process.
set -e
if [ "$TINKERFS_IN_NAMESPACE" = "" ]; then
    TINKERFS_IN_NAMESPACE=mount exec unshare --mount --propagation private sh "$0" "$@"
fi
work=$1 target=$2
shift 2
root=$work/root
mkdir "$root" "$work/memory" "$work/cgroup"
mount -t tmpfs tmpfs "$work/memory"
mkdir "$work/memory/upper" "$work/memory/overlay"
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/memory/upper,workdir=$work/memory/overlay" \
    "$root"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"  # first, because the directories may be below it
for directory in "$@"; do
    mkdir -p "$root$directory"
    mount --bind "$directory" "$root$directory"
done
# A control group of its own becomes the root of the machine's control groups.
mount -t cgroup2 cgroup2 "$work/cgroup"
mkdir "$work/cgroup/tinkerfs-interop-$$"
echo 0 >"$work/cgroup/tinkerfs-interop-$$/cgroup.procs"
mount -t proc proc "$root/proc"  # hidden by that of the machine below
chroot "$root" sh -s <"$work/prepare"
# shellcheck disable=SC2016
exec unshare --cgroup --mount --uts --ipc --net --pid --fork --kill-child=KILL sh -ec '
    cd "$1"
    mount -t proc proc proc
    mount -t sysfs -o ro sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount -t tmpfs tmpfs run
    mount -t tmpfs -o mode=755 tmpfs dev
    for device in null:3 zero:5 full:7 random:8 urandom:9; do
        mknod -m 666 "dev/${device%:*}" c 1 "${device#*:}"
    done
    mknod -m 666 dev/fuse c 10 229
    mkdir dev/shm dev/pts
    ip link set lo up
    pivot_root . mnt
    # systemd lets services see new mounts, and mounts the credentials of a service, only in a
    # shared tree. As process 1 of a machine it makes the tree shared itself, elsewhere it does not.
    exec chroot . sh -ec "
        umount --lazy /mnt
        mount --make-rshared /
        exec env --ignore-environment container=tinkerfs PATH=/usr/sbin:/usr/bin:/sbin:/bin \
            /lib/systemd/systemd --unit=$2 --log-target=journal --show-status=no
    "
' sh "$root" "$target"
