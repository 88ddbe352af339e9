// ragged_append_ on the CPU: t new rows behind each head's own, in place.
#include <cmath>
#include <cstring>

#include <torch/csrc/stable/library.h>

#include "../checks.h"

namespace asymkv {
namespace {

// Bytes copied below which threads are not worth starting.
constexpr int64_t kGrainBytes = 1 << 16;

struct Rows {
  char* data;
  const char* fresh;
  int64_t bytes, head_stride, row_stride;  // of a row; strides of `fresh` in bytes

  Rows(const Tensor& column, const Tensor& added, int64_t width)
      : data(static_cast<char*>(column.mutable_data_ptr())),
        fresh(static_cast<const char*>(added.const_data_ptr())) {
    const int64_t size = added.element_size();
    bytes = width * size;
    head_stride = added.stride(0) * size;
    row_stride = added.stride(1) * size;
  }

  void copy(int64_t to, int64_t head, int64_t count) const {
    const char* from = fresh + head * head_stride;
    if (row_stride == bytes || count == 1) {
      std::memcpy(data + to * bytes, from, count * bytes);
    } else {
      for (int64_t i = 0; i < count; ++i) std::memcpy(data + (to + i) * bytes, from + i * row_stride, bytes);
    }
  }
};

void ragged_append_(Tensor keys, Tensor values, Tensor cardinality, Tensor log_n, Tensor position, Tensor length,
                    Tensor start, Tensor capacity, Tensor new_keys, Tensor new_values, Tensor new_position,
                    std::optional<Tensor> new_cardinality, std::optional<Tensor> counts) {
  check_append(keys, values, cardinality, log_n, position, length, start, capacity, new_keys, new_values, new_position,
               new_cardinality, counts);
  const int64_t heads = length.size(0), fresh = new_keys.size(1);
  int64_t* len = static_cast<int64_t*>(length.mutable_data_ptr());
  const auto* first = static_cast<const int64_t*>(start.const_data_ptr());
  const auto* room = static_cast<const int64_t*>(capacity.const_data_ptr());
  const auto* take = counts ? static_cast<const int64_t*>(counts->const_data_ptr()) : nullptr;
  check_runs(first, len, room, heads, keys.size(0));
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t n = take ? take[h] : fresh;
    ASYMKV_CHECK(n >= 0 && n <= fresh, "counts must lie in [0, ", fresh, "]; head ", h, " has ", n);
    ASYMKV_CHECK(n <= room[h] - len[h], "capacity must hold the new rows; head ", h, " has ", len[h], " rows of ",
                    room[h], " and gets ", n);
  }
  const Rows k(keys, new_keys, keys.size(1)), v(values, new_values, values.size(1));
  const Rows p(position, new_position, 1);
  auto* n_of = static_cast<int32_t*>(cardinality.mutable_data_ptr());
  auto* log_of = static_cast<float*>(log_n.mutable_data_ptr());
  const auto* n_new = new_cardinality ? static_cast<const int32_t*>(new_cardinality->const_data_ptr()) : nullptr;
  const int64_t head_step = n_new ? new_cardinality->stride(0) : 0, row_step = n_new ? new_cardinality->stride(1) : 0;
  if (n_new)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < (take ? take[h] : fresh); ++i)
        ASYMKV_CHECK(n_new[h * head_step + i * row_step] >= 1, "new_cardinality must be >= 1; found ",
                        n_new[h * head_step + i * row_step]);
  const int64_t grain = 1 + kGrainBytes / (1 + fresh * (k.bytes + v.bytes));
  torch::stable::parallel_for(0, heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      const int64_t count = take ? take[h] : fresh, at = first[h] + len[h];
      k.copy(at, h, count);
      v.copy(at, h, count);
      p.copy(at, h, count);
      for (int64_t i = 0; i < count; ++i) {
        const int32_t n = n_new ? n_new[h * head_step + i * row_step] : 1;
        n_of[at + i] = n;
        log_of[at + i] = n == 1 ? 0.0f : std::log(static_cast<float>(n));
      }
      len[h] += count;
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(asymkv, CPU, m) { m.impl("ragged_append_", TORCH_BOX(&ragged_append_)); }

}  // namespace asymkv
