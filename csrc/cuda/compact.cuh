// ragged_compact for CUDA: a thread makes one pair of key dimensions, or one element of a value or statistic, of a row.
#pragma once
#include <cmath>
#include <optional>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../checks.h"
#include "launch.cuh"

namespace asymkv {

// Element i of a stored type T, in the type C of the arithmetic.
template <typename T, typename C>
__device__ inline C read(const T* p, int64_t i) {
  return static_cast<C>(p[i]);
}

struct CompactRows {
  const void *keys, *values, *weight;
  const int32_t *cardinality, *position, *order, *offset;
  const int64_t *rotary, *target, *out_start;
  const float* inv_freq;
  void *out_keys, *out_values;
  int32_t *out_cardinality, *out_position;
  float* out_log_n;
  int64_t keys_head, values_head, weight_head, cardinality_head, position_head, order_head, offset_head, rotary_head,
      target_head;
  int64_t heads, width, dim, value_dim, weights, out_rows;
};

struct StatisticRows {
  const void* from;
  void* to;
  int64_t head_stride, width;
};

// The members of group s of a head: order[first .. end); none, if the group does not exist or its row has no place.
struct Group {
  const int32_t *begin, *end;
  int64_t head, row;
};

__device__ inline Group group_of(const CompactRows& a, int64_t item) {
  const int64_t head = item / a.width, s = item % a.width;
  const int32_t* offset = a.offset + head * a.offset_head + s;
  const int32_t* order = a.order + head * a.order_head;
  Group g{order + offset[0], order + offset[1], head, a.out_start[head] + s};
  if (g.row < 0 || g.row >= a.out_rows) g.end = g.begin;
  return g;
}

template <typename C>
__device__ inline void angle(int64_t position, float inv_freq, C* cosine, C* sine) {
  const C x = static_cast<C>(static_cast<float>(position) * inv_freq);
  *cosine = cos(x);
  *sine = sin(x);
}

// Dimensions d and d + D/2 of the merged key at position 0.
template <typename T, typename C>
__device__ inline void merge_pair(const CompactRows& a, const Group& g, int64_t d, C* low, C* high) {
  const int64_t half = a.dim / 2, step = a.weights > 1 ? 1 : 0;
  const auto* n = a.cardinality + g.head * a.cardinality_head;
  const auto* rotary = a.rotary + g.head * a.rotary_head;
  const auto* keys = static_cast<const T*>(a.keys) + g.head * a.keys_head;
  const auto* weight = a.weight ? static_cast<const C*>(a.weight) + g.head * a.weight_head : nullptr;
  C top[2] = {0, 0}, by_count[2] = {0, 0}, sum[2] = {0, 0}, mean[2] = {0, 0}, count = 0;
  // Normalised by the largest before summing: squared gradients may be as small as 1e-30.
  for (const int32_t* i = g.begin; weight && i < g.end; ++i)
    for (int side = 0; side < 2; ++side) {
      const C w = weight[*i * a.weights + step * (d + side * half)];
      top[side] = w > top[side] ? w : top[side];
    }
  for (const int32_t* i = g.begin; i < g.end; ++i) {
    C cosine, sine;
    angle<C>(rotary[*i], a.inv_freq[d], &cosine, &sine);
    const C x = read<T, C>(keys, *i * a.dim + d), y = read<T, C>(keys, *i * a.dim + d + half);
    const C turned[2] = {x * cosine + y * sine, y * cosine - x * sine}, share = static_cast<C>(n[*i]);
    count += share;
    for (int side = 0; side < 2; ++side) {
      by_count[side] += share * turned[side];
      if (top[side] > 0) {
        const C w = weight[*i * a.weights + step * (d + side * half)] / top[side];
        mean[side] += w * turned[side];
        sum[side] += w;
      }
    }
  }
  *low = top[0] > 0 ? mean[0] / sum[0] : by_count[0] / count;
  *high = top[1] > 0 ? mean[1] / sum[1] : by_count[1] / count;
}

// Items: (group, pair of key dimensions).
template <typename T, typename C>
__global__ void compact_keys_kernel(CompactRows a) {
  const int64_t half = a.dim / 2;
  ASYMKV_FOR_ITEMS(item, a.heads * a.width * half) {
    const int64_t d = item % half;
    const Group g = group_of(a, item / half);
    if (g.begin >= g.end) continue;
    const int64_t last = g.end[-1], s = item / half % a.width;
    const int64_t at = a.rotary[g.head * a.rotary_head + last];
    const int64_t to = a.target ? a.target[g.head * a.target_head + s] : a.position[g.head * a.position_head + last];
    const T* keys = static_cast<const T*>(a.keys) + g.head * a.keys_head;
    T* out = static_cast<T*>(a.out_keys) + g.row * a.dim;
    const bool alone = g.end - g.begin == 1;
    if (alone && (!a.target || to == at)) {
      out[d] = keys[last * a.dim + d];
      out[d + half] = keys[last * a.dim + d + half];
      continue;
    }
    C low, high, cosine, sine;
    if (alone) {
      low = read<T, C>(keys, last * a.dim + d);
      high = read<T, C>(keys, last * a.dim + d + half);
    } else {
      merge_pair<T, C>(a, g, d, &low, &high);
    }
    angle<C>(alone ? to - at : to, a.inv_freq[d], &cosine, &sine);
    out[d] = static_cast<T>(low * cosine - high * sine);
    out[d + half] = static_cast<T>(high * cosine + low * sine);
  }
}

// Items: (group, element of the value); the first of a group also writes what is one number a row.
template <typename T, typename C>
__global__ void compact_values_kernel(CompactRows a) {
  ASYMKV_FOR_ITEMS(item, a.heads * a.width * a.value_dim) {
    const int64_t d = item % a.value_dim;
    const Group g = group_of(a, item / a.value_dim);
    if (g.begin >= g.end) continue;
    const auto* n = a.cardinality + g.head * a.cardinality_head;
    const T* values = static_cast<const T*>(a.values) + g.head * a.values_head;
    T* out = static_cast<T*>(a.out_values) + g.row * a.value_dim;
    int64_t count = 0;
    C sum = 0;
    for (const int32_t* i = g.begin; i < g.end; ++i) {
      count += n[*i];
      sum += static_cast<C>(n[*i]) * read<T, C>(values, *i * a.value_dim + d);
    }
    out[d] = g.end - g.begin == 1 ? values[*g.begin * a.value_dim + d] : static_cast<T>(sum / static_cast<C>(count));
    if (d == 0) {
      a.out_cardinality[g.row] = static_cast<int32_t>(count);
      a.out_log_n[g.row] = static_cast<float>(log(static_cast<C>(count)));
      a.out_position[g.row] = a.position[g.head * a.position_head + g.end[-1]];
    }
  }
}

template <typename X, typename S>
__global__ void compact_statistic_kernel(CompactRows a, StatisticRows x) {
  ASYMKV_FOR_ITEMS(item, a.heads * a.width * x.width) {
    const int64_t d = item % x.width;
    const Group g = group_of(a, item / x.width);
    if (g.begin >= g.end) continue;
    const X* from = static_cast<const X*>(x.from) + g.head * x.head_stride;
    S sum = 0;
    for (const int32_t* i = g.begin; i < g.end; ++i) sum += read<X, S>(from, *i * x.width + d);
    static_cast<X*>(x.to)[g.row * x.width + d] = static_cast<X>(sum);
  }
}

template <typename X>
inline const X* pointer(const Tensor& x) {
  return static_cast<const X*>(x.const_data_ptr());
}

inline CompactRows compact_rows(const CompactArgs& c) {
  CompactRows a{};
  a.keys = c.keys.const_data_ptr();
  a.values = c.values.const_data_ptr();
  a.weight = c.key_weight ? c.key_weight->const_data_ptr() : nullptr;
  a.cardinality = pointer<int32_t>(c.cardinality);
  a.position = pointer<int32_t>(c.position);
  a.order = pointer<int32_t>(c.order);
  a.offset = pointer<int32_t>(c.offset);
  a.rotary = pointer<int64_t>(c.rotary);
  a.target = c.target_rotary ? pointer<int64_t>(*c.target_rotary) : nullptr;
  a.out_start = pointer<int64_t>(c.out_start);
  a.inv_freq = pointer<float>(c.inv_freq);
  a.out_keys = c.out_keys.mutable_data_ptr();
  a.out_values = c.out_values.mutable_data_ptr();
  a.out_cardinality = static_cast<int32_t*>(c.out_cardinality.mutable_data_ptr());
  a.out_position = static_cast<int32_t*>(c.out_position.mutable_data_ptr());
  a.out_log_n = static_cast<float*>(c.out_log_n.mutable_data_ptr());
  a.keys_head = c.keys.stride(0);
  a.values_head = c.values.stride(0);
  a.weight_head = c.key_weight ? c.key_weight->stride(0) : 0;
  a.cardinality_head = c.cardinality.stride(0);
  a.position_head = c.position.stride(0);
  a.order_head = c.order.stride(0);
  a.offset_head = c.offset.stride(0);
  a.rotary_head = c.rotary.stride(0);
  a.target_head = c.target_rotary ? c.target_rotary->stride(0) : 0;
  a.heads = c.heads();
  a.width = c.width();
  a.dim = c.keys.size(2);
  a.value_dim = c.values.size(2);
  a.weights = c.key_weight ? c.key_weight->size(2) : 0;
  a.out_rows = c.out_keys.size(0);
  return a;
}

template <typename T, typename C>
void run_compact(const CompactArgs& c) {
  const CompactRows a = compact_rows(c);
  ASYMKV_LAUNCH((compact_keys_kernel<T, C>), a.heads * a.width * (a.dim / 2), c.keys, a);
  ASYMKV_LAUNCH((compact_values_kernel<T, C>), a.heads * a.width * a.value_dim, c.keys, a);
}

template <typename X, typename S>
void run_statistic(const CompactArgs& c, size_t i) {
  const CompactRows a = compact_rows(c);
  const Tensor& from = c.statistics[i];
  const StatisticRows x{from.const_data_ptr(), c.out_statistics[i].mutable_data_ptr(), from.stride(0),
                        from.dim() == 3 ? from.size(2) : 1};
  ASYMKV_LAUNCH((compact_statistic_kernel<X, S>), a.heads * a.width * x.width, c.keys, a, x);
}

inline void compact_on_device(Tensor keys, Tensor values, Tensor cardinality, Tensor position, Tensor rotary,
                              std::vector<Tensor> statistics, std::optional<Tensor> key_weight, Tensor order,
                              Tensor offset, Tensor inv_freq, std::optional<Tensor> target_rotary, Tensor out_start,
                              Tensor out_keys, Tensor out_values, Tensor out_cardinality, Tensor out_log_n,
                              Tensor out_position, std::vector<Tensor> out_statistics) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const CompactArgs c{keys, values, cardinality, position, rotary, statistics, key_weight, order, offset, inv_freq,
                      target_rotary, out_start, out_keys, out_values, out_cardinality, out_log_n, out_position,
                      out_statistics};
  check_compact(c);
  const OnDevice guard(keys);
  switch (keys.scalar_type()) {
    case ScalarType::Float: run_compact<float, float>(c); break;
    case ScalarType::Double: run_compact<double, double>(c); break;
    case ScalarType::Half: run_compact<Half, float>(c); break;
    default: run_compact<BFloat16, float>(c);
  }
  for (size_t i = 0; i < statistics.size(); ++i) switch (statistics[i].scalar_type()) {
      case ScalarType::Float: run_statistic<float, float>(c, i); break;
      case ScalarType::Double: run_statistic<double, double>(c, i); break;
      case ScalarType::Half: run_statistic<Half, float>(c, i); break;
      default: run_statistic<BFloat16, float>(c, i);
    }
}

}  // namespace asymkv
