#!/usr/bin/env bash
# Looks for data races with ThreadSanitizer, in the tests that have threads; the standard library is built with it too.
#
#   scripts/tsan.sh             all of them, some ten minutes once they are built
#   scripts/tsan.sh TARGET...   some: lib, or the name of a file in tests/
#
# No part of .ci/run: it needs a nightly toolchain with the component rust-src, which CI does not install. It fails, and says so,
# where there is none. Other sizes by ALIGHT_ROUNDS, ALIGHT_READERS_SECONDS and ALIGHT_BACKUPS.
set -euo pipefail
cd "$(dirname "$0")/.."

toolchain=${ALIGHT_NIGHTLY:-nightly}
if ! rustc "+$toolchain" --version >/dev/null 2>&1; then
    echo "no toolchain $toolchain: rustup toolchain install $toolchain --component rust-src, or name one with ALIGHT_NIGHTLY" >&2
    exit 1
fi
if [ ! -e "$(rustc "+$toolchain" --print sysroot)/lib/rustlib/src/rust/library/std/Cargo.toml" ]; then
    echo "$toolchain has no source of the standard library: rustup component add rust-src --toolchain $toolchain" >&2
    exit 1
fi

export RUSTFLAGS="-Zsanitizer=thread ${RUSTFLAGS:-}"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/tsan
# The first race ends the process that has it.
export TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1}
# Everything is several times slower, and every process starts slowly.
export ALIGHT_ROUNDS=${ALIGHT_ROUNDS:-100} ALIGHT_READERS_SECONDS=${ALIGHT_READERS_SECONDS:-2} ALIGHT_BACKUPS=${ALIGHT_BACKUPS:-5}
target=$(rustc "+$toolchain" -vV | sed -n 's/^host: //p')

suite() {
    local which=(--test "$1") skipped=()
    if [ "$1" = lib ]; then
        which=(--lib)
        # It asks that the kernel keeps 150 MiB in the page cache, which it may refuse a process of this size; it has no
        # threads but those of the tests beside it.
        skipped=(--skip what_is_loaded_again_comes_out_of_pinned_pages)
    fi
    echo "== $1 ($SECONDS s)"
    cargo "+$toolchain" test --locked -Zbuild-std --target "$target" --package alight "${which[@]}" -- "${skipped[@]}"
}

if [ $# -eq 0 ]; then
    set -- races readers linearizable backup space store gds device spans lib
fi
for name in "$@"; do
    suite "$name"
done
echo "== no races found ($SECONDS s)"
