// Between stored types and fp32.
#pragma once
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../checks.h"
#include "kernels.h"

namespace asymkv {

inline Type type_of(ScalarType type) {
  return type == ScalarType::Float ? Type::kFloat : type == ScalarType::Half ? Type::kHalf : Type::kBFloat16;
}

template <typename T>
inline void convert_to_float(const void* from, int64_t count, float* to) {
  const T* x = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(x[i]);
}

inline void to_float(Type type, const void* from, int64_t count, float* to) {
  switch (type) {
    case Type::kFloat: return convert_to_float<float>(from, count, to);
    case Type::kHalf: return convert_to_float<torch::headeronly::Half>(from, count, to);
    case Type::kBFloat16: return convert_to_float<torch::headeronly::BFloat16>(from, count, to);
  }
}

// Writes to elements `at`, `at` + 1, ... of `to`.
inline void from_float(Type type, const float* from, int64_t count, void* to, int64_t at) {
  switch (type) {
    case Type::kFloat: std::memcpy(static_cast<float*>(to) + at, from, count * sizeof(float)); return;
    case Type::kHalf:
      for (int64_t i = 0; i < count; ++i) static_cast<torch::headeronly::Half*>(to)[at + i] = from[i];
      return;
    case Type::kBFloat16:
      for (int64_t i = 0; i < count; ++i) static_cast<torch::headeronly::BFloat16*>(to)[at + i] = from[i];
      return;
  }
}

}  // namespace asymkv
