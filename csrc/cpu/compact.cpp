// ragged_compact on the CPU: keep, drop and merge rows into a fresh buffer, one pass over what is kept.
#include <cmath>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../checks.h"
#include "kernels.h"

namespace asymkv {
namespace {

void angles(int64_t position, const float* inv_freq, int64_t count, float* cos, float* sin) {
  kernels().angles(static_cast<float>(position), inv_freq, count, cos, sin);
}

void angles(int64_t position, const float* inv_freq, int64_t count, double* cos, double* sin) {
  for (int64_t i = 0; i < count; ++i) {
    const double angle = static_cast<float>(position) * inv_freq[i];
    cos[i] = std::cos(angle);
    sin[i] = std::sin(angle);
  }
}

// T as stored, C of the arithmetic: float, or double for double.
template <typename T, typename C>
struct Compactor {
  const CompactArgs& a;
  const int64_t dim = a.keys.size(2), value_dim = a.values.size(2), half = dim / 2;
  const float* inv_freq = static_cast<const float*>(a.inv_freq.const_data_ptr());
  const int64_t weights = a.key_weight ? a.key_weight->size(2) : 0;
  // of one head
  const T *keys{}, *values{};
  const int32_t *cardinality{}, *position{}, *order{}, *offset{};
  const int64_t *rotary{}, *target{};
  const C* weight{};
  int64_t head{};
  std::vector<C> cos, sin, total, sum, pre, top;

  explicit Compactor(const CompactArgs& args)
      : a(args), cos(half), sin(half), total(std::max(dim, value_dim)), sum(dim), pre(dim), top(dim) {}

  template <typename X>
  static const X* at(const Tensor& x, int64_t h) {
    return static_cast<const X*>(x.const_data_ptr()) + h * x.stride(0);
  }

  template <typename X>
  static X* out(const Tensor& x, int64_t row, int64_t width) {
    return static_cast<X*>(x.mutable_data_ptr()) + row * width;
  }

  void run_head(int64_t h, int64_t count) {
    head = h;
    keys = at<T>(a.keys, h);
    values = at<T>(a.values, h);
    cardinality = at<int32_t>(a.cardinality, h);
    position = at<int32_t>(a.position, h);
    order = at<int32_t>(a.order, h);
    offset = at<int32_t>(a.offset, h);
    rotary = at<int64_t>(a.rotary, h);
    target = a.target_rotary ? at<int64_t>(*a.target_rotary, h) : nullptr;
    weight = a.key_weight ? at<C>(*a.key_weight, h) : nullptr;
    const int64_t first = static_cast<const int64_t*>(a.out_start.const_data_ptr())[h];
    for (int64_t s = 0; s < count; ++s) {
      const int32_t *begin = order + offset[s], *end = order + offset[s + 1];
      const int64_t to = target ? target[s] : position[end[-1]];
      if (end - begin == 1) copy_row(*begin, first + s, target ? to : rotary[*begin]);
      else merge_rows(begin, end, first + s, to);
    }
  }

  void copy_row(int64_t i, int64_t row, int64_t to) {
    T* key = out<T>(a.out_keys, row, dim);
    if (to == rotary[i]) {
      std::memcpy(key, keys + i * dim, dim * sizeof(T));
    } else {
      angles(to - rotary[i], inv_freq, half, cos.data(), sin.data());
      for (int64_t d = 0; d < dim; ++d) pre[d] = static_cast<C>(keys[i * dim + d]);
      rotate(key);
    }
    std::memcpy(out<T>(a.out_values, row, value_dim), values + i * value_dim, value_dim * sizeof(T));
    *out<int32_t>(a.out_cardinality, row, 1) = cardinality[i];
    *out<float>(a.out_log_n, row, 1) = std::log(static_cast<float>(cardinality[i]));
    *out<int32_t>(a.out_position, row, 1) = position[i];
    for (size_t x = 0; x < a.statistics.size(); ++x) {
      const Tensor &from = a.statistics[x], &to_column = a.out_statistics[x];
      const int64_t bytes = (from.dim() == 3 ? from.size(2) : 1) * from.element_size();
      std::memcpy(static_cast<char*>(to_column.mutable_data_ptr()) + row * bytes,
                  static_cast<const char*>(from.const_data_ptr()) + head * from.stride(0) * from.element_size() +
                      i * bytes, bytes);
    }
  }

  // key = pre turned forward by the angles in cos and sin.
  void rotate(T* key) const {
    for (int64_t d = 0; d < half; ++d) {
      key[d] = static_cast<T>(pre[d] * cos[d] - pre[d + half] * sin[d]);
      key[d + half] = static_cast<T>(pre[d + half] * cos[d] + pre[d] * sin[d]);
    }
  }

  void merge_rows(const int32_t* begin, const int32_t* end, int64_t row, int64_t to) {
    int64_t n = 0;
    std::fill(total.begin(), total.end(), C(0));
    for (const int32_t* i = begin; i < end; ++i) {
      n += cardinality[*i];
      const C share = static_cast<C>(cardinality[*i]);
      for (int64_t d = 0; d < value_dim; ++d) total[d] += share * static_cast<C>(values[*i * value_dim + d]);
    }
    T* value = out<T>(a.out_values, row, value_dim);
    for (int64_t d = 0; d < value_dim; ++d) value[d] = static_cast<T>(total[d] / static_cast<C>(n));
    *out<int32_t>(a.out_cardinality, row, 1) = static_cast<int32_t>(n);
    *out<float>(a.out_log_n, row, 1) = static_cast<float>(std::log(static_cast<C>(n)));
    *out<int32_t>(a.out_position, row, 1) = position[end[-1]];
    for (size_t x = 0; x < a.statistics.size(); ++x) add_statistic(x, begin, end, row);
    merge_keys(begin, end, static_cast<C>(n));
    angles(to, inv_freq, half, cos.data(), sin.data());
    rotate(out<T>(a.out_keys, row, dim));
  }

  // pre = weighted mean of the members' keys, each turned back to position 0.
  void merge_keys(const int32_t* begin, const int32_t* end, C n) {
    std::vector<C>& by_count = total;
    std::fill(by_count.begin(), by_count.end(), C(0));
    std::fill(pre.begin(), pre.end(), C(0));
    std::fill(sum.begin(), sum.end(), C(0));
    std::fill(top.begin(), top.end(), C(0));
    // Normalised by the largest before summing: squared gradients may be as small as 1e-30.
    if (weight)
      for (const int32_t* i = begin; i < end; ++i)
        for (int64_t d = 0; d < dim; ++d) top[d] = std::max(top[d], weight[*i * weights + (weights > 1 ? d : 0)]);
    for (const int32_t* i = begin; i < end; ++i) {
      angles(rotary[*i], inv_freq, half, cos.data(), sin.data());
      const T* key = keys + int64_t(*i) * dim;
      const C share = static_cast<C>(cardinality[*i]);
      for (int64_t d = 0; d < half; ++d) {
        const C low = static_cast<C>(key[d]), high = static_cast<C>(key[d + half]);
        add(d, low * cos[d] + high * sin[d], share, *i, by_count);
        add(d + half, high * cos[d] - low * sin[d], share, *i, by_count);
      }
    }
    for (int64_t d = 0; d < dim; ++d) pre[d] = top[d] > 0 ? pre[d] / sum[d] : by_count[d] / n;
  }

  void add(int64_t d, C x, C share, int64_t i, std::vector<C>& by_count) {
    by_count[d] += share * x;
    if (top[d] > 0) {
      const C w = weight[i * weights + (weights > 1 ? d : 0)] / top[d];
      pre[d] += w * x;
      sum[d] += w;
    }
  }

  void add_statistic(size_t x, const int32_t* begin, const int32_t* end, int64_t row) {
    const Tensor& from = a.statistics[x];
    const int64_t width = from.dim() == 3 ? from.size(2) : 1;
    switch (from.scalar_type()) {
      case ScalarType::Float: return add_rows<float, float>(from, a.out_statistics[x], width, begin, end, row);
      case ScalarType::Double: return add_rows<double, double>(from, a.out_statistics[x], width, begin, end, row);
      case ScalarType::Half:
        return add_rows<torch::headeronly::Half, float>(from, a.out_statistics[x], width, begin, end, row);
      default: return add_rows<torch::headeronly::BFloat16, float>(from, a.out_statistics[x], width, begin, end, row);
    }
  }

  template <typename X, typename S>
  void add_rows(const Tensor& from, const Tensor& to, int64_t width, const int32_t* begin, const int32_t* end,
                int64_t row) {
    const X* source = at<X>(from, head);
    for (int64_t d = 0; d < width; ++d) {
      S found = 0;
      for (const int32_t* i = begin; i < end; ++i) found += static_cast<S>(source[*i * width + d]);
      out<X>(to, row, width)[d] = static_cast<X>(found);
    }
  }
};

template <typename T, typename C>
void run(const CompactArgs& a, const std::vector<int64_t>& counts) {
  torch::stable::parallel_for(0, a.heads(), 1, [&](int64_t begin, int64_t end) {
    Compactor<T, C> compactor(a);
    for (int64_t h = begin; h < end; ++h) compactor.run_head(h, counts[h]);
  });
}

// Groups of every head, once order, offset, cardinality and weights are known to be sound.
std::vector<int64_t> check_content(const CompactArgs& a) {
  const int64_t width = a.width();
  std::vector<int64_t> counts(a.heads());
  const auto* first = static_cast<const int64_t*>(a.out_start.const_data_ptr());
  int64_t free_from = 0;
  for (int64_t h = 0; h < a.heads(); ++h) {
    const auto* order = static_cast<const int32_t*>(a.order.const_data_ptr()) + h * a.order.stride(0);
    const auto* offset = static_cast<const int32_t*>(a.offset.const_data_ptr()) + h * a.offset.stride(0);
    const auto* n = static_cast<const int32_t*>(a.cardinality.const_data_ptr()) + h * a.cardinality.stride(0);
    ASYMKV_CHECK(offset[0] == 0, "offset must begin with 0; head ", h, " has ", offset[0]);
    for (int64_t s = 0; s < width; ++s)
      ASYMKV_CHECK(offset[s + 1] >= offset[s] && offset[s + 1] <= width, "offset must ascend up to ", width,
                      "; head ", h, " has ", offset[s + 1], " at ", s + 1);
    while (counts[h] < width && offset[counts[h]] < offset[counts[h] + 1]) ++counts[h];
    ASYMKV_CHECK(offset[counts[h]] == offset[width], "offset must have its empty groups last; head ", h);
    for (int64_t i = 0; i < offset[width]; ++i) {
      ASYMKV_CHECK(order[i] >= 0 && order[i] < width, "order must lie in [0, ", width, "); head ", h, " has ",
                      order[i]);
      ASYMKV_CHECK(n[order[i]] >= 1, "cardinality must be >= 1; head ", h, " row ", order[i], " has ",
                      n[order[i]]);
    }
    ASYMKV_CHECK(first[h] >= free_from && counts[h] <= a.out_keys.size(0) - first[h], "out_start must leave every "
                    "head its own rows inside out_keys; head ", h, " starts at ", first[h], " with ", counts[h]);
    free_from = first[h] + counts[h];
  }
  return counts;
}

void ragged_compact(Tensor keys, Tensor values, Tensor cardinality, Tensor position, Tensor rotary,
                    std::vector<Tensor> statistics, std::optional<Tensor> key_weight, Tensor order, Tensor offset,
                    Tensor inv_freq, std::optional<Tensor> target_rotary, Tensor out_start, Tensor out_keys,
                    Tensor out_values, Tensor out_cardinality, Tensor out_log_n, Tensor out_position,
                    std::vector<Tensor> out_statistics) {
  const CompactArgs a{keys, values, cardinality, position, rotary, statistics, key_weight, order, offset, inv_freq,
                      target_rotary, out_start, out_keys, out_values, out_cardinality, out_log_n, out_position,
                      out_statistics};
  check_compact(a);
  const std::vector<int64_t> counts = check_content(a);
  switch (keys.scalar_type()) {
    case ScalarType::Float: return run<float, float>(a, counts);
    case ScalarType::Double: return run<double, double>(a, counts);
    case ScalarType::Half: return run<torch::headeronly::Half, float>(a, counts);
    default: return run<torch::headeronly::BFloat16, float>(a, counts);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(asymkv, CPU, m) { m.impl("ragged_compact", TORCH_BOX(&ragged_compact)); }

}  // namespace asymkv
