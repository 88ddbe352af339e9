// Column sums over queries: attention mass and output curvature of each row (included by isa_*.cpp).
//
// A tile of queries lies in the lanes of two vectors, so that a row's sum needs one reduction over lanes at the end.
#pragma once
#include "simd.h"

namespace asymkv {
namespace ASYMKV_ISA {

constexpr int kRowsAtOnce = kLanes / 2;  // rows whose sums stay in registers
constexpr int kHalves = 2;
constexpr int kTile = kHalves * kLanes;

template <typename T>
static inline void to_float(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = scalar(from[i]);
}

static inline void rows_to_float(Type type, const void* from, int64_t count, float* to) {
  switch (type) {
    case Type::kFloat: return to_float(static_cast<const float*>(from), count, to);
    case Type::kBFloat16: return to_float(static_cast<const BFloat16Bits*>(from), count, to);
    case Type::kHalf: return to_float(static_cast<const HalfBits*>(from), count, to);
  }
}

// dots[j][lane] = row_j . column_lane for kRowsAtOnce rows; `columns [dim, kTile]`.
static inline void tile_dots(const float* rows, const float* columns, int64_t dim, vf (*dots)[kHalves]) {
  vf sum[kRowsAtOnce][kHalves];
#pragma GCC unroll 8
  for (int j = 0; j < kRowsAtOnce; ++j) sum[j][0] = sum[j][1] = vf{};
  for (int64_t d = 0; d < dim; ++d) {
    const vf a = load(columns + d * kTile), b = load(columns + d * kTile + kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const vf x = splat(rows[j * dim + d]);
      sum[j][0] += x * a;
      sum[j][1] += x * b;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kRowsAtOnce; ++j) {
    dots[j][0] = sum[j][0];
    dots[j][1] = sum[j][1];
  }
}

// Probability of a row for each query of a tile, from its scaled logits.
static inline vf probability(vf logits, float log_n, int32_t position, const float* lse, const int64_t* at) {
  vf p = exp(logits + splat(log_n) - load(lse));
  for (int i = 0; i < kLanes; ++i)
    if (position > at[i]) p[i] = 0;
  return p;
}

static void mass(const ColumnArgs& a) {
  float* keys = a.scratch;
  rows_to_float(a.type, a.keys, a.rows * a.dim, keys);
  const int64_t padded = (a.rows + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce;
  for (int64_t i = a.rows * a.dim; i < padded * a.dim; ++i) keys[i] = 0;
  for (int64_t t = 0; t < a.tiles; ++t) {
    const float* lse = a.lse + t * kTile;
    const int64_t* at = a.query_position + t * kTile;
    for (int64_t j = 0; j < a.rows; j += kRowsAtOnce) {
      if (a.position[j] > a.last_position[t]) continue;
      vf dots[kRowsAtOnce][kHalves];
      tile_dots(keys + j * a.dim, a.query + t * a.dim * kTile, a.dim, dots);
      for (int64_t i = j; i < a.rows && i < j + kRowsAtOnce; ++i)
        a.mass[i] += hsum(probability(dots[i - j][0], a.log_n[i], a.position[i], lse, at) +
                          probability(dots[i - j][1], a.log_n[i], a.position[i], lse + kLanes, at + kLanes));
    }
  }
}

// into[j][d] += sum over queries of energy[j][q] x[q][d], for kRows rows and kCount vectors from column d on.
constexpr int kRows = 4;

template <int kCount>
static inline void add_outer_part(const float* energy, const float* x, int64_t width, int64_t d, float* into) {
  vf sum[kRows][kCount];
  for (int j = 0; j < kRows; ++j)
    for (int i = 0; i < kCount; ++i) sum[j][i] = load(into + j * width + d + i * kLanes);
  for (int q = 0; q < kTile; ++q) {
    vf part[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) part[i] = load(x + q * width + d + i * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      const vf e = splat(energy[j * kTile + q]);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) sum[j][i] += e * part[i];
    }
  }
  for (int j = 0; j < kRows; ++j)
    for (int i = 0; i < kCount; ++i) store(into + j * width + d + i * kLanes, sum[j][i]);
}

// The same for all columns; `x [kTile, width]`.
static inline void add_outer(const float* energy, const float* x, int64_t width, float* into) {
  int64_t d = 0;
  for (; d + kVectors * kLanes <= width; d += kVectors * kLanes) add_outer_part<kVectors>(energy, x, width, d, into);
  for (; d + kLanes <= width; d += kLanes) add_outer_part<1>(energy, x, width, d, into);
  for (; d < width; ++d)
    for (int j = 0; j < kRows; ++j)
      for (int q = 0; q < kTile; ++q) into[j * width + d] += energy[j * kTile + q] * x[q * width + d];
}

// energy[j][q] = p^2 |v - o|^2 of kRowsAtOnce rows.
static inline void tile_energy(const ColumnArgs& a, int64_t t, int64_t j, const float* keys, const float* values,
                               const float* value_square, float* energy) {
  vf dots[kRowsAtOnce][kHalves], cross[kRowsAtOnce][kHalves];
  tile_dots(keys + j * a.dim, a.query + t * a.dim * kTile, a.dim, dots);
  tile_dots(values + j * a.dim, a.out + t * a.dim * kTile, a.dim, cross);
  for (int i = 0; i < kRowsAtOnce; ++i)
    for (int half = 0; half < kHalves; ++half) {
      const int64_t lane = t * kTile + half * kLanes;
      vf e = vf{};
      if (j + i < a.rows) {
        const vf p = probability(dots[i][half], a.log_n[j + i], a.position[j + i], a.lse + lane, a.query_position + lane);
        const vf distance = splat(value_square[i]) + load(a.out_square + lane) - cross[i][half] - cross[i][half];
        e = max(distance, vf{}) * p * p;
      }
      store(energy + i * kTile + half * kLanes, e);
    }
}

static void curvature(const ColumnArgs& a) {
  float* keys = a.scratch;
  float* values = keys + kBlock * a.dim;
  float energy[kRowsAtOnce * kTile], value_square[kRowsAtOnce];
  rows_to_float(a.type, a.keys, a.rows * a.dim, keys);
  rows_to_float(a.type, a.values, a.rows * a.dim, values);
  const int64_t padded = (a.rows + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce;
  for (int64_t i = a.rows * a.dim; i < padded * a.dim; ++i) keys[i] = values[i] = 0;
  for (int64_t j = 0; j < a.rows; j += kRowsAtOnce) {
    for (int i = 0; i < kRowsAtOnce; ++i) {
      value_square[i] = 0;
      for (int64_t d = 0; d < a.dim; ++d) value_square[i] += values[(j + i) * a.dim + d] * values[(j + i) * a.dim + d];
    }
    for (int64_t t = 0; t < a.tiles; ++t) {
      if (a.position[j] > a.last_position[t]) continue;
      tile_energy(a, t, j, keys, values, value_square, energy);
      // square and product have room for a whole block: rows beyond the last take zeros.
      for (int i = 0; i < kRowsAtOnce; i += kRows) {
        add_outer(energy + i * kTile, a.query_square + t * kTile * a.dim, a.dim, a.square + (j + i) * a.dim);
        add_outer(energy + i * kTile, a.query_product + t * kTile * (a.dim / 2), a.dim / 2,
                  a.product + (j + i) * (a.dim / 2));
      }
    }
  }
}

}  // namespace ASYMKV_ISA
}  // namespace asymkv
