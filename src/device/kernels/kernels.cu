// What alight has done on the GPU itself: the checksums of bytes that lie there, and the gathering of small values.
// scripts/ptx.sh compiles it to kernels.ptx, which is checked in beside it; build.rs refuses one made from other source.
//
// CRC-32 here is crc32fast's: IEEE, reflected. A CRC is linear: with the bits of a range as the coefficients of a
// polynomial m over GF(2) it is m·x^32 mod P, plus a constant of the length for the inversions before and after. So parts
// of a range can be taken by different blocks and lanes: each is multiplied by x for every bit behind it, and all are
// added, which is exclusive or. In a word, bit 31 stands for x^0 and bit 0 for x^31, as in the reflected CRC.

#include <stdint.h>

#define ON_BOTH __host__ __device__

typedef uint32_t u32;
typedef uint64_t u64;

// Threads of a block: those of the launch, in src/device/cuda/kernels.rs.
constexpr u32 THREADS = 256;
// What a thread loads at once.
constexpr u32 GRANULE_BYTES = 16;
// What one block takes of a range; the launch has a block for each.
constexpr u32 PART_BYTES = 128 << 10;
constexpr u32 PART_GRANULES = PART_BYTES / GRANULE_BYTES;
constexpr u32 WARP = 32;

constexpr u32 POLYNOMIAL = 0xEDB88320u;
constexpr u32 ONE = 0x80000000u;

// a·x mod P.
ON_BOTH constexpr u32 times_x(u32 a) { return (a >> 1) ^ ((a & 1u) ? POLYNOMIAL : 0u); }

// a/x mod P: P has the term 1, so x has an inverse.
ON_BOTH constexpr u32 over_x(u32 a) { return (a & ONE) ? ((a ^ POLYNOMIAL) << 1) | 1u : a << 1; }

// a·b mod P.
ON_BOTH constexpr u32 times(u32 a, u32 b) {
  u32 product = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; bit--) {
    product ^= ((b >> bit) & 1u) ? a : 0u;
    a = times_x(a);
  }
  return product;
}

// x^(8·bytes) mod P.
constexpr u32 x8(u64 bytes) {
  u32 power = ONE, result = ONE;
  for (int i = 0; i < 8; i++) power = times_x(power);
  for (; bytes; bytes >>= 1) {
    if (bytes & 1) result = times(result, power);
    power = times(power, power);
  }
  return result;
}

struct Constants {
  // x^(8·2^k).
  u32 powers[40];
  // x^-(8·n).
  u32 inverses[GRANULE_BYTES];
  // What moves a lane's granule behind those of the lanes after it, and a warp's behind those of the warps after it.
  u32 lanes[WARP];
  u32 warps[THREADS / WARP];
  // Each bit of a word, moved by one granule of every thread.
  u32 stride[32];

  constexpr Constants() : powers(), inverses(), lanes(), warps(), stride() {
    u32 power = x8(1), inverse = ONE;
    for (u32 k = 0; k < 40; k++) {
      powers[k] = power;
      power = times(power, power);
    }
    for (u32 n = 0; n < GRANULE_BYTES; n++) {
      inverses[n] = inverse;
      for (int i = 0; i < 8; i++) inverse = over_x(inverse);
    }
    for (u32 lane = 0; lane < WARP; lane++) lanes[lane] = x8(u64(GRANULE_BYTES) * (WARP - 1 - lane));
    for (u32 warp = 0; warp < THREADS / WARP; warp++)
      warps[warp] = x8(u64(GRANULE_BYTES) * WARP * (THREADS / WARP - 1 - warp));
    for (u32 bit = 0; bit < 32; bit++) stride[bit] = times(1u << bit, x8(u64(GRANULE_BYTES) * THREADS));
  }
};

__constant__ constexpr Constants C;

constexpr u32 X32 = x8(4);

// x^(8·bytes) mod P, on the device.
static __device__ u32 x8_of(u64 bytes) {
  u32 result = ONE;
  for (u32 k = 0; bytes; k++, bytes >>= 1)
    if (bytes & 1) result = times(result, C.powers[k]);
  return result;
}

// A granule, with zeros where it reaches out of the range. No byte outside of the range is touched.
static __device__ uint4 load(u64 address, u64 start, u64 end) {
  if (address >= start && address + GRANULE_BYTES <= end) return *reinterpret_cast<const uint4 *>(address);
  u64 halves[2] = {0, 0};
#pragma unroll 1
  for (u32 i = 0; i < GRANULE_BYTES; i++) {
    if (address + i < start || address + i >= end) continue;
    const u64 byte = u64(*reinterpret_cast<const uint8_t *>(address + i)) << (i % 8 * 8);
    halves[0] |= i < 8 ? byte : 0;
    halves[1] |= i < 8 ? 0 : byte;
  }
  return make_uint4(u32(halves[0]), u32(halves[0] >> 32), u32(halves[1]), u32(halves[1] >> 32));
}

struct Range {
  u64 address;
  u64 len;
};

// The CRC-32 of each range. `crcs` are zeros before, and the grid has `parts` blocks for each range: as many as the
// longest one needs, counted in parts of PART_BYTES with one more for a start that is not on a granule.
extern "C" __global__ void __launch_bounds__(THREADS) crc32_ranges(const Range *ranges, u32 *crcs, u32 parts) {
  __shared__ u32 table[4][256];
  __shared__ u32 partial[THREADS / WARP];
  const u32 thread = threadIdx.x;
  const Range range = ranges[blockIdx.x / parts];
  const u64 part = blockIdx.x % parts;
  const u64 range_end = range.address + range.len;
  const u64 first = range.address / GRANULE_BYTES + part * PART_GRANULES;
  const u64 granules_end = (range_end + GRANULE_BYTES - 1) / GRANULE_BYTES;
  // The whole block leaves, or none of it.
  if (first >= granules_end && part > 0) return;
  const u64 last = min(granules_end, first + PART_GRANULES);
  const u32 count = last > first ? u32(last - first) : 0;

  // The stride's multiplication, a byte of the word at a time.
  for (u32 row = 0; row < 4; row++) {
    u32 value = 0;
    for (u32 bit = 0; bit < 8; bit++) value ^= ((thread >> bit) & 1u) ? C.stride[row * 8 + bit] : 0u;
    table[row][thread] = value;
  }
  __syncthreads();

  // The last granule is the last thread's: what is missing of a whole round lies in front, and zeros in front of a
  // polynomial change nothing.
  u32 sums[4] = {0, 0, 0, 0};
  const u32 rounds = (count + THREADS - 1) / THREADS;
  const u32 missing = rounds * THREADS - count;
#pragma unroll 2
  for (u32 round = 0; round < rounds; round++) {
    const u32 at = round * THREADS + thread;
    uint4 granule = make_uint4(0, 0, 0, 0);
    if (at >= missing) granule = load((first + (at - missing)) * GRANULE_BYTES, range.address, range_end);
    const u32 words[4] = {granule.x, granule.y, granule.z, granule.w};
    for (u32 i = 0; i < 4; i++) {
      const u32 sum = sums[i];
      sums[i] = words[i] ^ table[0][sum & 255u] ^ table[1][(sum >> 8) & 255u] ^ table[2][(sum >> 16) & 255u] ^
                table[3][sum >> 24];
    }
  }

  // The words of a thread, the lanes of a warp, the warps of the block, each behind those before it.
  u32 sum = sums[0];
  for (u32 i = 1; i < 4; i++) sum = times(sum, X32) ^ sums[i];
  sum = times(sum, C.lanes[thread % WARP]);
  for (u32 step = WARP / 2; step > 0; step /= 2) sum ^= __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (thread % WARP == 0) partial[thread / WARP] = times(sum, C.warps[thread / WARP]);
  __syncthreads();
  if (thread > 0) return;
  sum = 0;
  for (u32 warp = 0; warp < THREADS / WARP; warp++) sum ^= partial[warp];
  const u64 end = last * GRANULE_BYTES;
  if (end >= range_end)
    // The last granule reached this far past the end.
    sum = times(sum, C.inverses[end - range_end]);
  else
    sum = times(sum, x8_of(range_end - end));
  sum = times(sum, X32);
  if (part == 0) sum ^= times(0xFFFFFFFFu, x8_of(range.len)) ^ 0xFFFFFFFFu;
  atomicXor(&crcs[blockIdx.x / parts], sum);
}

struct Copy {
  u64 source;
  u64 target;
  u64 len;
};

// Copies each piece with one warp. Pieces do not overlap.
extern "C" __global__ void __launch_bounds__(THREADS) gather(const Copy *copies, u32 count) {
  const u32 lane = threadIdx.x % WARP;
  const u32 index = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
  if (index >= count) return;
  const Copy copy = copies[index];
  u64 at = 0;
  if (((copy.source | copy.target) % GRANULE_BYTES) == 0) {
    const u64 whole = copy.len / GRANULE_BYTES;
    const uint4 *source = reinterpret_cast<const uint4 *>(copy.source);
    uint4 *target = reinterpret_cast<uint4 *>(copy.target);
    for (u64 i = lane; i < whole; i += WARP) target[i] = source[i];
    at = whole * GRANULE_BYTES;
  }
  const uint8_t *source = reinterpret_cast<const uint8_t *>(copy.source);
  uint8_t *target = reinterpret_cast<uint8_t *>(copy.target);
  for (u64 i = at + lane; i < copy.len; i += WARP) target[i] = source[i];
}
