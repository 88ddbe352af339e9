// compaction_layout on the CPU: which rows become one, in the order in which they are stored.
#include <cstring>
#include <memory>

#include <torch/csrc/stable/library.h>

#include "../checks.h"

namespace asymkv {
namespace {

// One head: rows ordered by (group, index), groups by their last member, dropped rows behind all.
int64_t layout_head(const int64_t* destination, int64_t rows, int64_t width, int32_t* newest, int32_t* order,
                    int32_t* offset) {
  std::memset(newest, -1, width * sizeof(int32_t));
  for (int64_t i = 0; i < rows; ++i)
    if (destination[i] >= 0) newest[destination[i]] = static_cast<int32_t>(i);
  // offset first counts members, then turns into where the next member of a group goes.
  int64_t groups = 0;
  int32_t* slot = order;  // of the group that ends at a row; order itself is filled last
  for (int64_t i = 0; i < rows; ++i)
    if (destination[i] >= 0 && newest[destination[i]] == i) slot[destination[i]] = static_cast<int32_t>(groups++);
  std::memset(offset, 0, (width + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < rows; ++i)
    if (destination[i] >= 0) newest[i] = slot[destination[i]], ++offset[newest[i] + 1];
    else newest[i] = -1;
  for (int64_t s = 0; s < width; ++s) offset[s + 1] += offset[s];
  const int32_t kept = offset[groups];
  int32_t dropped = kept;
  std::unique_ptr<int32_t[]> next(new int32_t[groups + 1]);
  std::memcpy(next.get(), offset, groups * sizeof(int32_t));
  for (int64_t i = 0; i < width; ++i)
    order[i < rows && newest[i] >= 0 ? next[newest[i]]++ : dropped++] = static_cast<int32_t>(i);
  return groups;
}

void check_head(const int64_t* destination, int64_t head, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t to = destination[i];
    ASYMKV_CHECK(to >= -1 && to < rows, "destination must lie in [-1, ", rows, "); head ", head, " row ", i,
                    " has ", to);
    ASYMKV_CHECK(to < 0 || destination[to] == to, "destination must be a row that is its own destination; head ",
                    head, " row ", i, " has ", to);
  }
}

std::tuple<Tensor, Tensor, Tensor> compaction_layout(Tensor destination, Tensor length) {
  check_dtype("destination", destination, ScalarType::Long);
  check_shape("destination", destination, {-1, -1});
  check_contiguous("destination", destination);
  const int64_t heads = destination.size(0), width = destination.size(1);
  ASYMKV_CHECK(width < kInt32Max, "destination must have fewer than ", kInt32Max, " rows; found ", width);
  check_index("length", length, heads, destination);
  const auto* to = static_cast<const int64_t*>(destination.const_data_ptr());
  const auto* rows = static_cast<const int64_t*>(length.const_data_ptr());
  for (int64_t h = 0; h < heads; ++h) {
    ASYMKV_CHECK(rows[h] >= 0 && rows[h] <= width, "length must lie in [0, ", width, "]; head ", h, " has ",
                    rows[h]);
    check_head(to + h * width, h, rows[h]);
  }
  Tensor order = torch::stable::new_empty(destination, {heads, width}, ScalarType::Int);
  Tensor offset = torch::stable::new_empty(destination, {heads, width + 1}, ScalarType::Int);
  Tensor count = torch::stable::new_empty(destination, {heads});
  auto* order_of = static_cast<int32_t*>(order.mutable_data_ptr());
  auto* offset_of = static_cast<int32_t*>(offset.mutable_data_ptr());
  auto* count_of = static_cast<int64_t*>(count.mutable_data_ptr());
  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<int32_t[]> newest(new int32_t[width + 1]);
    for (int64_t h = begin; h < end; ++h)
      count_of[h] = layout_head(to + h * width, rows[h], width, newest.get(), order_of + h * width,
                                offset_of + h * (width + 1));
  });
  return {order, offset, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(asymkv, CPU, m) { m.impl("compaction_layout", TORCH_BOX(&compaction_layout)); }

}  // namespace asymkv
