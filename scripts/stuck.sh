#!/usr/bin/env bash
# A real disk that does not come back: makes one of a file (700 MiB in $TMPDIR), and runs `tests/stuck_disk.rs` in it, which has the
# kernel hold the test's own reads and writes back, a byte a second, and let them go again.
#
#   scripts/stuck.sh       as root: needs losetup, mkfs.ext4, and the controller for block devices of cgroups, version 1 or 2
#
# No part of .ci/run: not every machine lets a test do that.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
device=
group=
cleanup() {
    [ -z "$group" ] || {
        # Nobody is held back any more, and nobody is in it.
        throttle 0
        rmdir "$group" 2>/dev/null || true
    }
    mountpoint -q "$work/disk" && umount "$work/disk"
    [ -z "$device" ] || losetup --detach "$device"
    rm -rf "$work"
}
trap cleanup EXIT

truncate --size 700M "$work/image"
mkfs.ext4 -q "$work/image"
device=$(losetup --direct-io=on --find --show "$work/image")
mkdir "$work/disk"
mount "$device" "$work/disk"
number=$(cat "/sys/block/$(basename "$device")/dev")

if [ -d /sys/fs/cgroup/blkio ]; then
    group=/sys/fs/cgroup/blkio/alight-stuck.$$
    mkdir "$group"
    throttle() {
        echo "$number $1" >"$group/blkio.throttle.read_bps_device"
        echo "$number $1" >"$group/blkio.throttle.write_bps_device"
    }
else
    group=/sys/fs/cgroup/alight-stuck.$$
    echo +io >/sys/fs/cgroup/cgroup.subtree_control
    mkdir "$group"
    throttle() {
        [ "$1" = 0 ] && set -- max
        echo "$number rbps=$1 wbps=$1" >"$group/io.max"
    }
fi

# What the test has run by a shell, whose parent it is.
{
    echo "number=$number group=$group"
    declare -f throttle
} >"$work/throttle"
export ALIGHT_STUCK_FOLDER=$work/disk
export ALIGHT_STUCK_BEGIN=". $work/throttle; echo \$PPID >$group/cgroup.procs; throttle 1"
export ALIGHT_STUCK_END=". $work/throttle; throttle 0"
cargo test --locked --package alight --test stuck_disk -- --nocapture
