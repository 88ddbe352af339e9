// lma_decode on the CPU: Locally Merged Attention of a few queries, split over (head, piece of its rows).
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "convert.h"
#include "kernels.h"

namespace asymkv {
namespace {

constexpr int64_t kMinPiece = 512;       // rows below which a split costs more than it brings
constexpr int64_t kPiecesPerThread = 4;  // so that skewed heads still fill all threads

struct Piece {
  int64_t head, first, rows;
};

std::vector<Piece> split(const int64_t* start, const int64_t* length, int64_t heads) {
  int64_t total = 0;
  for (int64_t h = 0; h < heads; ++h) total += length[h];
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most =
      threads == 1 ? std::max<int64_t>(total, 1) : std::max(kMinPiece, total / (threads * kPiecesPerThread) + 1);
  std::vector<Piece> pieces;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t count = std::max<int64_t>((length[h] + most - 1) / most, 1);
    const int64_t size = (length[h] + count - 1) / count;
    for (int64_t i = 0; i < count; ++i)
      pieces.push_back({h, start[h] + i * size, std::max<int64_t>(std::min(size, length[h] - i * size), 0)});
  }
  return pieces;
}

// Joins the pieces of one head: out [queries, dim] (the values' dim) of the query's dtype and lse.
void join(const std::vector<Piece>& pieces, size_t begin, size_t end, const float* out, const float* top,
          const float* total, int64_t queries, int64_t dim, Type type, void* to, float* lse) {
  std::vector<float> sum(dim);
  for (int64_t q = 0; q < queries; ++q) {
    float largest = -std::numeric_limits<float>::infinity(), mass = 0;
    for (size_t p = begin; p < end; ++p) largest = std::max(largest, top[p * queries + q]);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (size_t p = begin; p < end && std::isfinite(largest); ++p) {
      const float share = std::exp(top[p * queries + q] - largest);
      mass += share * total[p * queries + q];
      const float* part = out + (p * queries + q) * dim;
      for (int64_t d = 0; d < dim; ++d) sum[d] += share * part[d];
    }
    const float scale = mass > 0 ? 1 / mass : 0;
    for (int64_t d = 0; d < dim; ++d) sum[d] *= scale;
    from_float(type, sum.data(), dim, to, (pieces[begin].head * queries + q) * dim);
    lse[pieces[begin].head * queries + q] = mass > 0 ? largest + std::log(mass) : largest;
  }
}

void check_decode(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& log_n,
                  const Tensor& start, const Tensor& length, const std::optional<Tensor>& position,
                  const std::optional<Tensor>& query_position) {
  check_float("keys", keys, false);
  check_shape("keys", keys, {-1, -1});
  check_head_dim(keys.size(1));
  check_contiguous("keys", keys);
  const int64_t rows = keys.size(0), dim = keys.size(1);
  check_dtype("values", values, keys.scalar_type());
  check_shape("values", values, {rows, -1});
  check_contiguous("values", values);
  check_dtype("query", query, keys.scalar_type());
  check_shape("query", query, {-1, -1, dim});
  check_contiguous("query", query);
  if (log_n) {
    check_dtype("log_n", *log_n, ScalarType::Float);
    check_shape("log_n", *log_n, {rows});
    check_contiguous("log_n", *log_n);
  }
  check_index("start", start, query.size(0), keys);
  check_index("length", length, query.size(0), keys);
  ASYMKV_CHECK(position.has_value() == query_position.has_value(),
                  "query_position must be given together with position");
  if (position) {
    check_dtype("position", *position, ScalarType::Int);
    check_shape("position", *position, {rows});
    check_contiguous("position", *position);
    check_dtype("query_position", *query_position, ScalarType::Long);
    check_shape("query_position", *query_position, {query.size(0), query.size(1)});
    check_contiguous("query_position", *query_position);
  }
}

std::tuple<Tensor, Tensor> lma_decode(Tensor query, Tensor keys, Tensor values, std::optional<Tensor> log_n,
                                      Tensor start, Tensor length, double scale, std::optional<Tensor> position,
                                      std::optional<Tensor> query_position) {
  check_decode(query, keys, values, log_n, start, length, position, query_position);
  const int64_t heads = query.size(0), queries = query.size(1), dim = query.size(2), value_dim = values.size(1);
  const auto* first = static_cast<const int64_t*>(start.const_data_ptr());
  const auto* rows = static_cast<const int64_t*>(length.const_data_ptr());
  check_runs(first, rows, nullptr, heads, keys.size(0));
  const Type type = type_of(keys.scalar_type());
  Tensor out = torch::stable::new_empty(query, {heads, queries, value_dim});
  Tensor lse = torch::stable::new_empty(query, {heads, queries}, ScalarType::Float);
  const std::vector<Piece> pieces = split(first, rows, heads);
  const int64_t count = static_cast<int64_t>(pieces.size());
  std::unique_ptr<float[]> scaled(new float[heads * queries * dim]);
  std::unique_ptr<float[]> parts(new float[count * queries * (value_dim + 2)]);
  to_float(type, query.const_data_ptr(), heads * queries * dim, scaled.get());
  for (int64_t i = 0; i < heads * queries * dim; ++i) scaled[i] *= static_cast<float>(scale);
  float *top = parts.get() + count * queries * value_dim, *total = top + count * queries;
  const auto at = [&](const Tensor& x, int64_t row, int64_t width) {
    return static_cast<const char*>(x.const_data_ptr()) + row * width * x.element_size();
  };
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const Piece& piece = pieces[p];
      AttendArgs a{};
      a.type = type;
      a.query = scaled.get() + piece.head * queries * dim;
      a.keys = at(keys, piece.first, dim);
      a.values = at(values, piece.first, value_dim);
      if (log_n) a.log_n = static_cast<const float*>(log_n->const_data_ptr()) + piece.first;
      if (position) {
        a.position = static_cast<const int32_t*>(position->const_data_ptr()) + piece.first;
        a.query_position = static_cast<const int64_t*>(query_position->const_data_ptr()) + piece.head * queries;
      }
      a.queries = queries;
      a.rows = piece.rows;
      a.dim = dim;
      a.value_dim = value_dim;
      a.out = parts.get() + p * queries * value_dim;
      a.top = top + p * queries;
      a.total = total + p * queries;
      kernels().attend(a);
    }
  });
  auto* lse_of = static_cast<float*>(lse.mutable_data_ptr());
  for (size_t begin = 0, end; begin < pieces.size(); begin = end) {
    for (end = begin + 1; end < pieces.size() && pieces[end].head == pieces[begin].head;) ++end;
    join(pieces, begin, end, parts.get(), top, total, queries, value_dim, type, out.mutable_data_ptr(), lse_of);
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(asymkv, CPU, m) { m.impl("lma_decode", TORCH_BOX(&lma_decode)); }

}  // namespace asymkv
