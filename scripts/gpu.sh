#!/usr/bin/env bash
# Tests and measures alight on a machine with an NVIDIA GPU, which need not have Rust.
#
#   scripts/gpu.sh build          here: builds the command-line tool, the tests and the benchmarks into .gpu/
#   scripts/gpu.sh run [GIB]      there, in a copy of this tree with .gpu/: runs the tests with ALIGHT_REQUIRE_GPU=1, takes
#                                 a checkpoint of GIB gibibytes (4.25) through the store and the GPU and compares it
#                                 with what torch loads, measures, and prints a short table last
#
#   scripts/gpu.sh peers [GIB] [decoder|crowd]
#                                 there: loads GIB gibibytes (6) of a decoder's tensors, or of a crowd of small ones, with alight
#                                 and with the published loaders that python3 can import, by turns
#
# `run` needs python3 with torch and safetensors. It works in $TMPDIR, and takes about five times GIB there.
set -euo pipefail
cd "$(dirname "$0")/.."

build() {
  rm -rf .gpu/bin && mkdir -p .gpu/bin
  export RUSTFLAGS="-C target-cpu=x86-64-v3"
  # A folder of its own: other flags would build everything anew, here and back.
  export CARGO_TARGET_DIR=target/gpu
  cargo build --release -p alight-cli
  cp target/gpu/release/alight .gpu/bin/alight
  # Every test binary under the name of its target, the library's unit tests as `unit`.
  cargo test --release --no-run --message-format=json -p alight |
    python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message.get("profile", {}).get("test"):
        target = message["target"]
        name = "unit" if "lib" in target["kind"] else target["name"]
        shutil.copy(message["executable"], ".gpu/bin/test-" + name)'
  cargo bench --no-run --message-format=json -p alight --bench open_and_lookup --bench gpu |
    python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and "bench" in message["target"]["kind"]:
        shutil.copy(message["executable"], ".gpu/bin/bench-" + message["target"]["name"])'
  strip .gpu/bin/*
  du -sh .gpu/bin
}

# cuFile asks udev what file system a disk holds. Where no udev runs, as in many containers, nobody answers, and it
# refuses every file: so this writes the answer down where libudev looks for it. Needs root; without it the cuFile tests
# say what is missing.
tell_udev() {
  local device major minor file
  device=$(stat -c %d "$1")
  major=$(((device >> 8) & 0xfff)) minor=$(((device & 0xff) | ((device >> 12) & 0xfff00)))
  file=/run/udev/data/b$major:$minor
  if [ ! -e "$file" ] && mkdir -p /run/udev/data 2>/dev/null; then
    printf 'E:ID_FS_USAGE=filesystem\nE:ID_FS_TYPE=%s\n' "$(stat -f -c %T "$1" | sed 's,ext2/ext3,ext4,')" >"$file" || true
  fi
}

run() {
  local gib=${1:-4.25} bin=$PWD/.gpu/bin work failed=0
  local -a table=()
  work=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder is known now, and gone from scope later
  trap "rm -rf '$work'" EXIT
  tell_udev "$work"
  export ALIGHT_REQUIRE_GPU=1
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  # The tests name files of this tree: they run in its root.
  for test in unit device gpu store gds cufile deadlines; do
    [ -x "$bin/test-$test" ] || continue
    echo "== test $test"
    # cuFile's streams fail now and then beside other threads: see src/cufile/mod.rs.
    local threads=4
    [ "$test" = cufile ] && threads=1
    if "$bin/test-$test" --test-threads $threads >"$work/log" 2>&1; then
      table+=("$(printf '%-34s %s' "test $test" "$(grep '^test result' "$work/log" | cut -d. -f1-2)")")
    else
      failed=1
      tail -60 "$work/log"
      table+=("$(printf '%-34s %s' "test $test" FAILED)")
    fi
  done
  if command -v compute-sanitizer >/dev/null; then
    echo "== compute-sanitizer"
    if compute-sanitizer --error-exitcode 9 "$bin/test-gpu" --test-threads 1 tensors_land >"$work/log" 2>&1; then
      table+=("$(printf '%-34s %s' "compute-sanitizer" "$(grep 'ERROR SUMMARY' "$work/log" | tail -1)")")
    else
      failed=1
      tail -30 "$work/log"
      table+=("$(printf '%-34s %s' "compute-sanitizer" FAILED)")
    fi
  fi
  echo "== a real checkpoint through the store and the GPU"
  if python3 scripts/gpu_roundtrip.py "$bin/alight" "$work" "$gib"; then
    table+=("$(printf '%-34s %s' "checkpoint of $gib GiB" "bit for bit what torch loads")")
  else
    failed=1
    table+=("$(printf '%-34s %s' "checkpoint of $gib GiB" FAILED)")
  fi
  echo "== the GPU beside the bus and the disk"
  "$bin/bench-gpu" --dir "$work" | tee "$work/gpu" || failed=1
  echo "== open and lookup"
  TMPDIR=$work "$bin/bench-open_and_lookup" | tee "$work/open" || failed=1
  echo "== the store beside the bare disk"
  mkdir "$work/bench"
  "$bin/alight" bench "$work/bench" --device host | tee "$work/disk" || failed=1
  echo
  echo "== summary"
  printf '%s\n' "${table[@]}"
  tail -n +1 "$work/gpu" "$work/open" "$work/disk" | grep -v '^$'
  return $failed
}

case ${1:-} in
  build) build ;;
  run) shift && run "$@" ;;
  peers)
    folder=$(mktemp -d)
    # shellcheck disable=SC2064 # the folder is known now
    trap "rm -rf '$folder'" EXIT
    python3 scripts/gpu_peers.py "$PWD/.gpu/bin/alight" "$folder" "${2:-6}" 3 "${3:-decoder}"
    ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
