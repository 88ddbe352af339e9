// Argument checks: every message names the argument, what it must be, and what was found.
#pragma once
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace asymkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what Python sees as RuntimeError, with this text alone.
template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

#define ASYMKV_CHECK(condition, ...)  \
  do {                                \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (0)

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kInt32Max = 2147483647;

inline std::string shape_of(const Tensor& x) {
  std::string out = "[";
  for (int64_t i = 0; i < x.dim(); ++i) out += (i ? ", " : "") + std::to_string(x.size(i));
  return out + "]";
}

inline void check_dtype(const char* name, const Tensor& x, ScalarType wanted) {
  ASYMKV_CHECK(x.scalar_type() == wanted, name, " must be ", torch::headeronly::toString(wanted), "; found ",
                  torch::headeronly::toString(x.scalar_type()));
}

inline bool is_half(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }

inline void check_float(const char* name, const Tensor& x, bool allow_double) {
  const ScalarType type = x.scalar_type();
  ASYMKV_CHECK(is_half(type) || type == ScalarType::Float || (allow_double && type == ScalarType::Double), name,
                  " must be Float, Half or BFloat16", allow_double ? " or Double" : "", "; found ",
                  torch::headeronly::toString(type));
}

// A size of -1 fits anything.
inline void check_shape(const char* name, const Tensor& x, std::vector<int64_t> sizes) {
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    fits = fits && (sizes[i] < 0 || x.size(i) == sizes[i]);
    wanted += (i ? ", " : "") + (sizes[i] < 0 ? std::string("*") : std::to_string(sizes[i]));
  }
  ASYMKV_CHECK(fits, name, " must be ", wanted, "]; found ", shape_of(x));
}

inline void check_contiguous(const char* name, const Tensor& x) {
  ASYMKV_CHECK(x.is_contiguous(), name, " must be contiguous");
}

// The last dimension lies densely in memory; the others may have any stride.
inline void check_dense_rows(const char* name, const Tensor& x) {
  ASYMKV_CHECK(x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1, name,
                  " must be contiguous in its last dimension; found stride ", x.stride(x.dim() - 1));
}

inline void check_head_dim(int64_t dim) {
  ASYMKV_CHECK(dim > 0 && dim % 8 == 0 && dim <= kMaxHeadDim, "keys must have a head dimension that is a multiple "
                  "of 8, at most ", kMaxHeadDim, "; found ", dim);
}

inline void check_same_device(const char* name, const Tensor& x, const Tensor& keys) {
  ASYMKV_CHECK(x.device() == keys.device(), name, " must be on the device of keys");
}

// start, length, capacity (int64 [N]): ascending runs inside a buffer of `rows`, none longer than its capacity.
inline void check_runs(const int64_t* start, const int64_t* length, const int64_t* capacity, int64_t heads,
                       int64_t rows) {
  int64_t end = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t room = capacity ? capacity[h] : length[h];
    ASYMKV_CHECK(length[h] >= 0, "length must be >= 0; head ", h, " has ", length[h]);
    ASYMKV_CHECK(room >= length[h], "capacity must be at least length; head ", h, " has ", room, " and ",
                    length[h]);
    ASYMKV_CHECK(start[h] >= end, "start must be ascending, runs apart from each other; head ", h, " starts at ",
                    start[h], ", free from ", end);
    ASYMKV_CHECK(room <= rows - start[h], capacity ? "capacity" : "length", " must end inside keys (", rows,
                    " rows); head ", h, " starts at ", start[h], " with ", room);
    end = start[h] + room;
  }
}

// The columns of a flat buffer, as every op over rows takes them; `prefix` goes before their names.
inline void check_columns(const Tensor& keys, const Tensor& values, const Tensor& cardinality, const Tensor& log_n,
                          const Tensor& position, bool allow_double, const std::string& prefix = "") {
  const std::string names[] = {prefix + "keys", prefix + "values", prefix + "cardinality", prefix + "log_n",
                               prefix + "position"};
  const Tensor* columns[] = {&keys, &values, &cardinality, &log_n, &position};
  check_float(names[0].c_str(), keys, allow_double);
  check_shape(names[0].c_str(), keys, {-1, -1});
  check_head_dim(keys.size(1));
  const int64_t rows = keys.size(0);
  check_dtype(names[1].c_str(), values, keys.scalar_type());
  check_shape(names[1].c_str(), values, {rows, -1});
  for (int i = 2; i < 5; ++i) {
    check_dtype(names[i].c_str(), *columns[i], i == 3 ? ScalarType::Float : ScalarType::Int);
    check_shape(names[i].c_str(), *columns[i], {rows});
  }
  for (int i = 0; i < 5; ++i) check_contiguous(names[i].c_str(), *columns[i]);
  for (int i = 0; i < 5; ++i) check_same_device(names[i].c_str(), *columns[i], keys);
}

inline void check_index(const char* name, const Tensor& x, int64_t heads, const Tensor& keys) {
  check_dtype(name, x, ScalarType::Long);
  check_shape(name, x, {heads});
  check_contiguous(name, x);
  check_same_device(name, x, keys);
}

// Arguments of ragged_append_, shapes and types only; shared by CPU and CUDA.
inline void check_append(const Tensor& keys, const Tensor& values, const Tensor& cardinality, const Tensor& log_n,
                         const Tensor& position, const Tensor& length, const Tensor& start, const Tensor& capacity,
                         const Tensor& new_keys, const Tensor& new_values, const Tensor& new_position,
                         const std::optional<Tensor>& new_cardinality, const std::optional<Tensor>& counts) {
  check_columns(keys, values, cardinality, log_n, position, true);
  ASYMKV_CHECK(length.dim() == 1, "length must be [N]; found ", shape_of(length));
  const int64_t heads = length.size(0);
  ASYMKV_CHECK(heads <= kInt32Max, "length must have at most ", kInt32Max, " heads; found ", heads);
  check_index("length", length, heads, keys);
  check_index("start", start, heads, keys);
  check_index("capacity", capacity, heads, keys);
  ASYMKV_CHECK(new_keys.dim() == 3, "new_keys must be [N, t, D]; found ", shape_of(new_keys));
  const int64_t fresh = new_keys.size(1);
  check_dtype("new_keys", new_keys, keys.scalar_type());
  check_shape("new_keys", new_keys, {heads, fresh, keys.size(1)});
  check_dense_rows("new_keys", new_keys);
  check_dtype("new_values", new_values, keys.scalar_type());
  check_shape("new_values", new_values, {heads, fresh, values.size(1)});
  check_dense_rows("new_values", new_values);
  check_dtype("new_position", new_position, ScalarType::Int);
  check_shape("new_position", new_position, {heads, fresh});
  check_same_device("new_keys", new_keys, keys);
  check_same_device("new_values", new_values, keys);
  check_same_device("new_position", new_position, keys);
  if (new_cardinality) {
    check_dtype("new_cardinality", *new_cardinality, ScalarType::Int);
    check_shape("new_cardinality", *new_cardinality, {heads, fresh});
    check_same_device("new_cardinality", *new_cardinality, keys);
  }
  if (counts) check_index("counts", *counts, heads, keys);
}

// Arguments of ragged_compact, shapes and types only; shared by CPU and CUDA.
struct CompactArgs {
  Tensor keys, values, cardinality, position, rotary;
  std::vector<Tensor> statistics;
  std::optional<Tensor> key_weight;
  Tensor order, offset, inv_freq;
  std::optional<Tensor> target_rotary;
  Tensor out_start, out_keys, out_values, out_cardinality, out_log_n, out_position;
  std::vector<Tensor> out_statistics;

  int64_t heads() const { return keys.size(0); }
  int64_t width() const { return keys.size(1); }
};

inline void check_source(const char* name, const Tensor& x, ScalarType type, std::vector<int64_t> sizes,
                         const Tensor& keys) {
  check_dtype(name, x, type);
  check_shape(name, x, sizes);
  check_same_device(name, x, keys);
  // Heads may lie apart from each other (a cut of a wider buffer); a head's rows may not.
  int64_t dense = 1;
  for (int64_t i = x.dim() - 1; i > 0; --i) {
    ASYMKV_CHECK(x.size(i) <= 1 || x.stride(i) == dense, name, " must be contiguous within a head");
    dense *= x.size(i);
  }
}

inline void check_compact(const CompactArgs& a) {
  check_float("keys", a.keys, true);
  check_shape("keys", a.keys, {-1, -1, -1});
  const int64_t heads = a.heads(), width = a.width(), dim = a.keys.size(2);
  ASYMKV_CHECK(width < kInt32Max, "keys must have fewer than ", kInt32Max, " rows a head; found ", width);
  check_head_dim(dim);
  const ScalarType type = a.keys.scalar_type();
  check_source("keys", a.keys, type, {heads, width, dim}, a.keys);
  check_source("values", a.values, type, {heads, width, -1}, a.keys);
  check_source("cardinality", a.cardinality, ScalarType::Int, {heads, width}, a.keys);
  check_source("position", a.position, ScalarType::Int, {heads, width}, a.keys);
  check_source("rotary", a.rotary, ScalarType::Long, {heads, width}, a.keys);
  check_source("order", a.order, ScalarType::Int, {heads, width}, a.keys);
  check_source("offset", a.offset, ScalarType::Int, {heads, width + 1}, a.keys);
  check_source("inv_freq", a.inv_freq, ScalarType::Float, {dim / 2}, a.keys);
  check_contiguous("inv_freq", a.inv_freq);
  const ScalarType compute = type == ScalarType::Double ? type : ScalarType::Float;
  if (a.key_weight) {
    ASYMKV_CHECK(a.key_weight->dim() == 3 && (a.key_weight->size(2) == 1 || a.key_weight->size(2) == dim),
                    "key_weight must be [N, T, 1] or [N, T, D]; found ", shape_of(*a.key_weight));
    check_source("key_weight", *a.key_weight, compute, {heads, width, a.key_weight->size(2)}, a.keys);
  }
  if (a.target_rotary) check_source("target_rotary", *a.target_rotary, ScalarType::Long, {heads, width}, a.keys);
  check_index("out_start", a.out_start, heads, a.keys);
  check_columns(a.out_keys, a.out_values, a.out_cardinality, a.out_log_n, a.out_position, true, "out_");
  check_same_device("out_keys", a.out_keys, a.keys);
  check_dtype("out_keys", a.out_keys, type);
  check_shape("out_keys", a.out_keys, {-1, dim});
  check_shape("out_values", a.out_values, {a.out_keys.size(0), a.values.size(2)});
  ASYMKV_CHECK(a.statistics.size() == a.out_statistics.size(), "out_statistics must have as many columns as "
                  "statistics, ", a.statistics.size(), "; found ", a.out_statistics.size());
  for (size_t i = 0; i < a.statistics.size(); ++i) {
    const Tensor &x = a.statistics[i], &y = a.out_statistics[i];
    check_float("statistics", x, true);
    ASYMKV_CHECK(x.dim() == 2 || x.dim() == 3, "statistics must be [N, T] or [N, T, E]; found ", shape_of(x));
    check_source("statistics", x, x.scalar_type(), x.dim() == 2 ? std::vector<int64_t>{heads, width}
                                                                : std::vector<int64_t>{heads, width, x.size(2)}, a.keys);
    check_dtype("out_statistics", y, x.scalar_type());
    check_shape("out_statistics", y, x.dim() == 2 ? std::vector<int64_t>{a.out_keys.size(0)}
                                                  : std::vector<int64_t>{a.out_keys.size(0), x.size(2)});
    check_contiguous("out_statistics", y);
    check_same_device("out_statistics", y, a.keys);
  }
}

}  // namespace asymkv
