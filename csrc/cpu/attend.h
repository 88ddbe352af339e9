// Decode attention: a tile of queries over the rows of one KV head, softmax on the fly (included by isa_*.cpp).
#pragma once
#include "simd.h"

namespace asymkv {
namespace ASYMKV_ISA {

constexpr int kAttendBlock = 64;  // rows whose logits are held before their values are read

// logits[g][j] = q_g . k_j for one block; absent rows of the last group of keys are left undefined.
template <typename T, int kQueries>
static inline void block_logits(const float* query, const T* keys, int64_t width, int rows,
                                float (*logits)[kAttendBlock]) {
  constexpr int kKeys = kLanes / kQueries;
  const int64_t whole = width / kLanes * kLanes;
  for (int j = 0; j < rows; j += kKeys) {
    vf sum[kLanes];
    for (int i = 0; i < kLanes; ++i) sum[i] = vf{};
    const T* key[kKeys];
    for (int i = 0; i < kKeys; ++i) key[i] = keys + int64_t(j + i < rows ? j + i : rows - 1) * width;
    for (int64_t d = 0; d < whole; d += kLanes) {
      vf q[kQueries];
      for (int g = 0; g < kQueries; ++g) q[g] = load(query + g * width + d);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const vf k = load(key[i] + d);
#pragma GCC unroll 4
        for (int g = 0; g < kQueries; ++g) sum[g * kKeys + i] += q[g] * k;
      }
    }
    float part[kLanes];
    store(part, sums(sum));
    for (int64_t d = whole; d < width; ++d)
      for (int g = 0; g < kQueries; ++g)
        for (int i = 0; i < kKeys; ++i) part[g * kKeys + i] += query[g * width + d] * scalar(key[i][d]);
    for (int g = 0; g < kQueries; ++g)
      for (int i = 0; i < kKeys; ++i) logits[g][j + i] = part[g * kKeys + i];
  }
}

// out[g] += sum_j weight[g][j] v_j over kCount vectors of the output from column d on.
template <typename T, int kCount, int kQueries>
static inline void add_values(const float (*weight)[kAttendBlock], const T* values, int64_t width, int rows, int64_t d,
                              float* out) {
  vf sum[kQueries][kCount];
  for (int g = 0; g < kQueries; ++g)
    for (int i = 0; i < kCount; ++i) sum[g][i] = load(out + g * width + d + i * kLanes);
  for (int j = 0; j < rows; ++j) {
    vf v[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) v[i] = load(values + j * width + d + i * kLanes);
#pragma GCC unroll 4
    for (int g = 0; g < kQueries; ++g) {
      const vf w = splat(weight[g][j]);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) sum[g][i] += w * v[i];
    }
  }
  for (int g = 0; g < kQueries; ++g)
    for (int i = 0; i < kCount; ++i) store(out + g * width + d + i * kLanes, sum[g][i]);
}

// Turns logits into weights exp(logit - top), rescaling what is summed so far when a larger logit comes.
static inline bool softmax_block(float* logits, int rows, int64_t width, float* out, float* top, float* total) {
  for (int j = rows; j < kAttendBlock; ++j) logits[j] = -kInf;
  vf largest = splat(*top);
  for (int j = 0; j < kAttendBlock; j += kLanes) largest = max(largest, load(logits + j));
  const float now = hmax(largest);
  if (now == -kInf) {
    for (int j = 0; j < kAttendBlock; ++j) logits[j] = 0;
    return false;
  }
  if (now > *top) {
    const float shrink = exp_scalar(*top - now);
    for (int64_t d = 0; d < width; ++d) out[d] *= shrink;
    *total *= shrink;
    *top = now;
  }
  vf sum = vf{};
  for (int j = 0; j < kAttendBlock; j += kLanes) {
    const vf weight = exp(load(logits + j) - splat(now));
    store(logits + j, weight);
    sum += weight;
  }
  *total += hsum(sum);
  return true;
}

template <typename T, int kQueries>
static void attend_tile(const AttendArgs& a, int64_t first) {
  const int64_t dim = a.dim, width = a.value_dim;
  const float* query = a.query + first * dim;
  float* out = a.out + first * width;
  float logits[kQueries][kAttendBlock];
  for (int64_t at = 0; at < a.rows; at += kAttendBlock) {
    const int rows = a.rows - at < kAttendBlock ? int(a.rows - at) : kAttendBlock;
    const T* values = static_cast<const T*>(a.values) + at * width;
    block_logits<T, kQueries>(query, static_cast<const T*>(a.keys) + at * dim, dim, rows, logits);
    bool any = false;
    for (int g = 0; g < kQueries; ++g) {
      if (a.log_n)
        for (int j = 0; j < rows; ++j) logits[g][j] += a.log_n[at + j];
      if (a.position)
        for (int j = 0; j < rows; ++j)
          if (a.position[at + j] > a.query_position[first + g]) logits[g][j] = -kInf;
      any |= softmax_block(logits[g], rows, width, out + g * width, a.top + first + g, a.total + first + g);
    }
    if (!any) continue;
    int64_t d = 0;
    for (; d + kVectors * kLanes <= width; d += kVectors * kLanes)
      add_values<T, kVectors, kQueries>(logits, values, width, rows, d, out);
    for (; d + kLanes <= width; d += kLanes) add_values<T, 1, kQueries>(logits, values, width, rows, d, out);
    for (; d < width; ++d)
      for (int g = 0; g < kQueries; ++g)
        for (int j = 0; j < rows; ++j) out[g * width + d] += logits[g][j] * scalar(values[j * width + d]);
  }
}

template <typename T>
static void attend_type(const AttendArgs& a) {
  for (int64_t i = 0; i < a.queries; ++i) {
    a.top[i] = -kInf;
    a.total[i] = 0;
  }
  for (int64_t i = 0; i < a.queries * a.value_dim; ++i) a.out[i] = 0;
  int64_t first = 0;
  for (; first + 4 <= a.queries; first += 4) attend_tile<T, 4>(a, first);
  for (; first + 2 <= a.queries; first += 2) attend_tile<T, 2>(a, first);
  if (first < a.queries) attend_tile<T, 1>(a, first);
}

static void attend(const AttendArgs& a) {
  switch (a.type) {
    case Type::kFloat: return attend_type<float>(a);
    case Type::kBFloat16: return attend_type<BFloat16Bits>(a);
    case Type::kHalf: return attend_type<HalfBits>(a);
  }
}

}  // namespace ASYMKV_ISA
}  // namespace asymkv
