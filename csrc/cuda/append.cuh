// ragged_append_ for CUDA: one launch in decode; a thread copies 16 bytes of a row, or what is left of it.
#pragma once
#include <cmath>
#include <optional>

#include "../checks.h"
#include "launch.cuh"

namespace asymkv {

struct AppendRows {
  char* data;
  const char* fresh;
  int64_t bytes, head_stride, row_stride, pieces;  // of a row; strides of `fresh` in bytes
  bool wide;                                       // every row begins at a multiple of 16 bytes
};

struct AppendArgs {
  AppendRows keys, values;
  int32_t *cardinality, *position;
  float* log_n;
  int64_t* length;
  const int64_t *start, *capacity, *counts;
  const int32_t *new_position, *new_cardinality;
  int64_t position_head, position_row, cardinality_head, cardinality_row;
  int64_t heads, fresh;
};

__device__ inline void copy_piece(const AppendRows& x, int64_t to, int64_t head, int64_t i, int64_t piece) {
  char* target = x.data + to * x.bytes + piece * 16;
  const char* source = x.fresh + head * x.head_stride + i * x.row_stride + piece * 16;
  const int64_t left = x.bytes - piece * 16;
  if (x.wide && left >= 16) {
    *reinterpret_cast<int4*>(target) = *reinterpret_cast<const int4*>(source);
  } else {
    for (int64_t b = 0; b < left && b < 16; ++b) target[b] = source[b];
  }
}

// Piece `item` of the new rows of one head: (row, piece of its key, then of its value).
__device__ inline void append_piece(const AppendArgs& a, int64_t head, int64_t length, int64_t item) {
  const int64_t pieces = a.keys.pieces + a.values.pieces, piece = item % pieces, i = item / pieces;
  const int64_t taken = a.counts ? a.counts[head] : a.fresh, at = length + i;
  // The host has checked the capacity; a table that disagrees must still not write outside its run.
  if (i >= taken || at < 0 || at >= a.capacity[head]) return;
  const int64_t to = a.start[head] + at;
  if (piece < a.keys.pieces) copy_piece(a.keys, to, head, i, piece);
  else copy_piece(a.values, to, head, i, piece - a.keys.pieces);
  if (piece == 0) {
    const int32_t n = a.new_cardinality ? a.new_cardinality[head * a.cardinality_head + i * a.cardinality_row] : 1;
    a.cardinality[to] = n;
    a.log_n[to] = n == 1 ? 0.0f : logf(float(n));
    a.position[to] = a.new_position[head * a.position_head + i * a.position_row];
  }
}

__device__ inline void lengthen(const AppendArgs& a, int64_t head, int64_t length) {
  const int64_t grown = length + (a.counts ? a.counts[head] : a.fresh);
  a.length[head] = grown < a.capacity[head] ? grown : a.capacity[head];
}

// Decode: a block per head, one launch. Every thread reads the old length before the last one writes the new.
__global__ void append_few_kernel(AppendArgs a) {
  for (int64_t head = blockIdx.x; head < a.heads; head += gridDim.x) {
    const int64_t length = a.length[head];
    const int64_t items = a.fresh * (a.keys.pieces + a.values.pieces);
    for (int64_t item = threadIdx.x; item < items; item += blockDim.x) append_piece(a, head, length, item);
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) lengthen(a, head, length);
  }
}

// Prefill: all threads share the rows of all heads, and a second launch counts the lengths up.
__global__ void append_many_kernel(AppendArgs a) {
  const int64_t items = a.fresh * (a.keys.pieces + a.values.pieces);
  ASYMKV_FOR_ITEMS(i, a.heads * items) append_piece(a, i / items, a.length[i / items], i % items);
}

__global__ void lengthen_kernel(AppendArgs a) {
  ASYMKV_FOR_ITEMS(head, a.heads) lengthen(a, head, a.length[head]);
}

// 16-byte pieces of a head's new rows up to which one block copies them.
constexpr int64_t kFewItems = 1024;

inline AppendRows append_rows(const Tensor& column, const Tensor& added) {
  AppendRows x{};
  const int64_t size = added.element_size();
  x.data = static_cast<char*>(column.mutable_data_ptr());
  x.fresh = static_cast<const char*>(added.const_data_ptr());
  x.bytes = column.size(1) * size;
  x.head_stride = added.stride(0) * size;
  x.row_stride = added.stride(1) * size;
  x.pieces = (x.bytes + 15) / 16;
  x.wide = x.bytes % 16 == 0 && x.head_stride % 16 == 0 && x.row_stride % 16 == 0 &&
           reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && reinterpret_cast<uintptr_t>(x.fresh) % 16 == 0;
  return x;
}

inline void append_on_device(Tensor keys, Tensor values, Tensor cardinality, Tensor log_n, Tensor position,
                             Tensor length, Tensor start, Tensor capacity, Tensor new_keys, Tensor new_values,
                             Tensor new_position, std::optional<Tensor> new_cardinality,
                             std::optional<Tensor> counts) {
  check_append(keys, values, cardinality, log_n, position, length, start, capacity, new_keys, new_values, new_position,
               new_cardinality, counts);
  const OnDevice guard(keys);
  AppendArgs a{};
  a.keys = append_rows(keys, new_keys);
  a.values = append_rows(values, new_values);
  a.cardinality = static_cast<int32_t*>(cardinality.mutable_data_ptr());
  a.position = static_cast<int32_t*>(position.mutable_data_ptr());
  a.log_n = static_cast<float*>(log_n.mutable_data_ptr());
  a.length = static_cast<int64_t*>(length.mutable_data_ptr());
  a.start = static_cast<const int64_t*>(start.const_data_ptr());
  a.capacity = static_cast<const int64_t*>(capacity.const_data_ptr());
  a.counts = counts ? static_cast<const int64_t*>(counts->const_data_ptr()) : nullptr;
  a.new_position = static_cast<const int32_t*>(new_position.const_data_ptr());
  a.position_head = new_position.stride(0);
  a.position_row = new_position.stride(1);
  if (new_cardinality) {
    a.new_cardinality = static_cast<const int32_t*>(new_cardinality->const_data_ptr());
    a.cardinality_head = new_cardinality->stride(0);
    a.cardinality_row = new_cardinality->stride(1);
  }
  a.heads = length.size(0);
  a.fresh = new_keys.size(1);
  const int64_t items = a.fresh * (a.keys.pieces + a.values.pieces);
  if (items <= kFewItems) {
    ASYMKV_LAUNCH(append_few_kernel, a.heads * kThreads, keys, a);
  } else {
    ASYMKV_LAUNCH(append_many_kernel, a.heads * items, keys, a);
    ASYMKV_LAUNCH(lengthen_kernel, a.heads, keys, a);
  }
}

}  // namespace asymkv
