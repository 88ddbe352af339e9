// The vector loops of the CPU ops, included once per instruction set (isa_*.cpp), each time in a namespace of its own.
//
// Written with the compilers' vector extensions: ASYMKV_LANES floats a vector, 16 for AVX-512's 32 wide registers, else
// 8. Nothing in here may call inline functions of the standard library: the linker could pick the copy that was compiled
// for the newest instruction set, and run it on a machine without it.
#pragma once
#include "kernels.h"

namespace asymkv {
namespace ASYMKV_ISA {

constexpr int kLanes = ASYMKV_LANES;

typedef float vf __attribute__((vector_size(4 * ASYMKV_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * ASYMKV_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * ASYMKV_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * ASYMKV_LANES)));

// Vectors of a sum that stay in registers beside four others.
constexpr int kVectors = kLanes / 4;
constexpr float kInf = __builtin_inff();

static inline vf splat(float x) { return x - vf{}; }

static inline vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

static inline vu widen(const uint16_t* p) {
  vh x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vu);
}

static inline vf load(const BFloat16Bits* p) { return (vf)(widen(&p->bits) << 16); }

static inline vf load(const HalfBits* p) {
  const vu bits = widen(&p->bits);
  const vu sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  // The exponent is moved by a multiplication, which also gets subnormal numbers right; infinity keeps its exponent.
  const vf moved = (vf)(rest << 13) * splat(0x1p112f);
  const vu special = (vu)(rest >= 0x7c00u) & 0x7f800000u;
  return (vf)((vu)moved | special | sign);
}

static inline void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }

static inline float scalar(float x) { return x; }

static inline float scalar(BFloat16Bits x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

static inline float scalar(HalfBits x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu, shifted = rest << 13;
  float moved;
  __builtin_memcpy(&moved, &shifted, sizeof moved);
  moved *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &moved, sizeof bits);
  bits |= sign | (rest >= 0x7c00u ? 0x7f800000u : 0u);
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

static inline vf max(vf a, vf b) { return a > b ? a : b; }

static inline float hmax(vf x) {
  float out = x[0];
  for (int i = 1; i < kLanes; ++i) out = x[i] > out ? x[i] : out;
  return out;
}

static inline float hsum(vf x) {
  float part[kLanes];
  store(part, x);
  for (int step = kLanes / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) part[i] += part[i + step];
  return part[0];
}

// exp, 1e-7 relative; 0 below -87.3 (so for -inf too). Arguments are at most 0 up to rounding.
static inline vf exp(vf x) {
  const vf clamped = max(x, splat(-87.33f));
  const vf scaled = clamped * splat(1.44269504f) + splat(12582912.0f);  // rounds to an integer in the low bits
  const vf whole = scaled - splat(12582912.0f);
  const vf r = (clamped - whole * splat(0.693359375f)) - whole * splat(-2.12194440e-4f);
  vf y = splat(1.9875691500e-4f);
  y = y * r + splat(1.3981999507e-3f);
  y = y * r + splat(8.3334519073e-3f);
  y = y * r + splat(4.1665795894e-2f);
  y = y * r + splat(1.6666665459e-1f);
  y = y * r + splat(5.0000001201e-1f);
  y = y * (r * r) + r + splat(1.0f);
  const vi power = __builtin_convertvector(whole, vi) + 127;
  const vf out = y * (vf)(power << 23);
  return x < splat(-87.33f) ? vf{} : out;
}

static inline float exp_scalar(float x) { return exp(splat(x))[0]; }

// Sums of kLanes vectors, one per lane: a transposing tree, each step two shuffles and an addition.
#if ASYMKV_LANES == 16
static inline vf sums(const vf* x) {
  vf a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)
    a[i] = __builtin_shufflevector(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; ++i)
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; ++i)
    c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
#else
static inline vf sums(const vf* x) {
  vf a[4], b[2];
  for (int i = 0; i < 4; ++i)
    a[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; ++i)
    b[i] = __builtin_shufflevector(a[i], a[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a[i], a[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(b[0], b[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         __builtin_shufflevector(b[0], b[1], 1, 9, 3, 11, 5, 13, 7, 15);
}
#endif

}  // namespace ASYMKV_ISA
}  // namespace asymkv
