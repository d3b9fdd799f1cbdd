#!/usr/bin/env bash
# Looks for undefined behaviour with Miri: all tests of the format, and those of alight's own that need no file, no mapping and
# no foreign library. Loops of thousands are shorter under it (`cfg!(miri)` in the tests); a test that is left out says why
# (`cfg_attr(miri, ignore = …)`).
#
#   scripts/miri.sh            both, some twenty minutes of one processor
#   scripts/miri.sh format     the format alone, ten minutes
#   scripts/miri.sh alight     the others: host memory, slots, the index, plans, retries and lanes, who waits for what may get
#                              stuck, metrics, prefetching, regions, aligned memory, group commit, recovery's decision,
#                              reclaim, space, tensors
#
# No part of .ci/run: it needs a nightly toolchain with the components miri and rust-src, which CI does not install. It fails, and
# says so, where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."

toolchain=${ALIGHT_NIGHTLY:-nightly}
if ! cargo "+$toolchain" miri --version >/dev/null 2>&1; then
    echo "no Miri: rustup toolchain install $toolchain --component miri,rust-src, or name one with ALIGHT_NIGHTLY" >&2
    exit 1
fi

# The golden files are read, and time is asked for.
export MIRIFLAGS=${MIRIFLAGS:--Zmiri-disable-isolation}
# Where a test does not say itself how often.
export PROPTEST_CASES=${PROPTEST_CASES:-3}

format() {
    echo "== alight-format ($SECONDS s)"
    cargo "+$toolchain" miri test --locked --package alight-format
}

# By module: what is left out maps files, asks the kernel in ways that Miri has not, calls a driver, or moves mebibytes through
# a simulated disk (io::handed: not one of its tests ends within two minutes).
alight() {
    echo "== alight ($SECONDS s)"
    cargo "+$toolchain" miri test --locked --package alight --lib -- \
        device::host:: device::slab index:: io::lanes io::payload io::plan io::retry io::watched metrics:: prefetch::line prefetch::pattern prefetch::scheduler region::lru \
        storage::aligned storage::landing storage::lent store::group store::recover store::reclaim store::space tensor::
}

case ${1:-both} in
format) format ;;
alight) alight ;;
both) format && alight ;;
*) sed -n '2,14s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
echo "== nothing undefined ($SECONDS s)"
