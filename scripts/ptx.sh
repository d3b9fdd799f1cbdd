#!/usr/bin/env bash
# Compiles src/device/kernels/kernels.cu to the PTX that is checked in beside it. Needs nvcc (CUDA 12 or newer); builds need
# neither it nor a GPU.
#
#   scripts/ptx.sh [OUT]     OUT: where the PTX goes, src/device/kernels/kernels.ptx where nothing is said
#
# The PTX says which source it was made from; build.rs compares.
set -euo pipefail
cd "$(dirname "$0")/../src/device/kernels"
out=${1:-kernels.ptx}
made=$(mktemp)
trap 'rm -f "$made"' EXIT
nvcc -std=c++17 -O3 -arch=compute_75 -ptx -o "$made" kernels.cu
{
  python3 -c 'import zlib; print("// source crc32 %08x" % zlib.crc32(open("kernels.cu", "rb").read()))'
  # The compiler names its newest version of PTX. What the kernels use was there in 7.0, and older drivers read only that.
  sed 's/^\.version .*/.version 7.0/' "$made"
} >"$out"
