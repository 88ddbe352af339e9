// attention_mass and key_curvature on the CPU: column sums over queries, block by block of rows.
#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "convert.h"
#include "kernels.h"

namespace asymkv {
namespace {

struct Columns {
  Tensor query, keys, values, log_n, position, query_position, lse;
  std::optional<Tensor> out;

  int64_t heads() const { return query.size(0); }
  int64_t group() const { return query.size(1); }
  int64_t queries() const { return query.size(2); }
  int64_t rows() const { return keys.size(1); }
  int64_t dim() const { return keys.size(2); }
};

void check_columns_args(const Columns& c) {
  check_float("keys", c.keys, false);
  check_shape("keys", c.keys, {-1, -1, -1});
  check_head_dim(c.dim());
  const int64_t heads = c.keys.size(0), rows = c.rows();
  check_source("keys", c.keys, c.keys.scalar_type(), {heads, rows, c.dim()}, c.keys);
  check_source("values", c.values, c.keys.scalar_type(), {heads, rows, c.dim()}, c.keys);
  check_dtype("query", c.query, c.keys.scalar_type());
  check_shape("query", c.query, {heads, -1, -1, c.dim()});
  check_contiguous("query", c.query);
  check_source("log_n", c.log_n, ScalarType::Float, {heads, rows}, c.keys);
  check_source("position", c.position, ScalarType::Int, {heads, rows}, c.keys);
  check_dtype("query_position", c.query_position, ScalarType::Long);
  check_shape("query_position", c.query_position, {heads, c.queries()});
  check_contiguous("query_position", c.query_position);
  check_dtype("lse", c.lse, ScalarType::Float);
  check_shape("lse", c.lse, {heads, c.group(), c.queries()});
  check_contiguous("lse", c.lse);
  if (c.out) {
    check_dtype("out", *c.out, c.keys.scalar_type());
    check_shape("out", *c.out, {heads, c.group(), c.queries(), c.dim()});
    check_contiguous("out", *c.out);
  }
}

// Queries of one query head, tile by tile, in the order that the kernels read them.
struct Tiles {
  int64_t count, width, dim;
  std::vector<float> query, out, out_square, query_square, query_product, lse;
  std::vector<int64_t> position, last;

  Tiles(const Columns& c, int64_t head, int64_t member, float scale)
      : width(kernels().tile), dim(c.dim()) {
    const int64_t queries = c.queries(), from = (head * c.group() + member) * queries;
    count = (queries + width - 1) / width;
    query.assign(count * dim * width, 0);
    lse.assign(count * width, std::numeric_limits<float>::infinity());
    position.assign(count * width, -1);
    last.assign(count, -1);
    if (c.out) {
      out.assign(count * dim * width, 0);
      out_square.assign(count * width, 0);
      query_square.assign(count * width * dim, 0);
      query_product.assign(count * width * (dim / 2), 0);
    }
    std::vector<float> row(dim);
    const auto type = type_of(c.keys.scalar_type());
    const auto* lse_of = static_cast<const float*>(c.lse.const_data_ptr()) + from;
    const auto* at = static_cast<const int64_t*>(c.query_position.const_data_ptr()) + head * queries;
    for (int64_t i = 0; i < queries; ++i) {
      // A query that is absent, or saw nothing, keeps lse = +inf: no row has a probability.
      if (at[i] < 0 || lse_of[i] == -std::numeric_limits<float>::infinity()) continue;
      lse[i] = lse_of[i];
      position[i] = at[i];
      last[i / width] = std::max(last[i / width], at[i]);
      to_float(type, element(c.query, (from + i) * dim), dim, row.data());
      fill_query(row, i, scale);
      if (!c.out) continue;
      to_float(type, element(*c.out, (from + i) * dim), dim, row.data());
      for (int64_t d = 0; d < dim; ++d) {
        out[(i / width * dim + d) * width + i % width] = row[d];
        out_square[i] += row[d] * row[d];
      }
    }
  }

  static const char* element(const Tensor& x, int64_t index) {
    return static_cast<const char*>(x.const_data_ptr()) + index * x.element_size();
  }

  void fill_query(const std::vector<float>& row, int64_t i, float scale) {
    for (int64_t d = 0; d < dim; ++d) query[(i / width * dim + d) * width + i % width] = row[d] * scale;
    if (query_square.empty()) return;
    for (int64_t d = 0; d < dim; ++d) query_square[i * dim + d] = row[d] * row[d];
    for (int64_t d = 0; d < dim / 2; ++d) query_product[i * (dim / 2) + d] = row[d] * row[d + dim / 2];
  }

  void describe(ColumnArgs& a) const {
    a.tiles = count;
    a.query = query.data();
    a.out = out.data();
    a.out_square = out_square.data();
    a.query_square = query_square.data();
    a.query_product = query_product.data();
    a.lse = lse.data();
    a.query_position = position.data();
    a.last_position = last.data();
  }
};

// Rows [first, first + a.rows) of one head.
ColumnArgs block_of(const Columns& c, int64_t head, int64_t first) {
  ColumnArgs a{};
  a.type = type_of(c.keys.scalar_type());
  a.rows = std::min(kBlock, c.rows() - first);
  a.dim = c.dim();
  const auto at = [&](const Tensor& x, int64_t width) {
    return static_cast<const char*>(x.const_data_ptr()) + (head * x.stride(0) + first * width) * x.element_size();
  };
  a.keys = at(c.keys, a.dim);
  a.values = at(c.values, a.dim);
  a.log_n = reinterpret_cast<const float*>(at(c.log_n, 1));
  a.position = reinterpret_cast<const int32_t*>(at(c.position, 1));
  return a;
}

// Calls visit(head, member, tiles, first row) for every block; a thread keeps the tiles of the head it works on.
template <typename F>
void for_blocks(const Columns& c, float scale, const F& visit) {
  const int64_t blocks = (c.rows() + kBlock - 1) / kBlock, groups = c.heads() * c.group();
  const int64_t threads = torch::stable::get_num_threads();
  // Several threads share a query head only if there are fewer heads than threads.
  const int64_t parts = std::clamp<int64_t>((2 * threads + groups - 1) / std::max<int64_t>(groups, 1), 1,
                                            std::max<int64_t>(blocks, 1));
  torch::stable::parallel_for(0, c.heads() * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / parts, part = i % parts;
      for (int64_t member = 0; member < c.group(); ++member) {
        const Tiles tiles(c, head, member, scale);
        for (int64_t b = part * blocks / parts; b < (part + 1) * blocks / parts; ++b) visit(head, member, tiles, b * kBlock);
      }
    }
  });
}

Tensor attention_mass(Tensor query, Tensor keys, Tensor log_n, Tensor position, Tensor query_position, Tensor lse,
                      double scale) {
  const Columns c{query, keys, keys, log_n, position, query_position, lse, std::nullopt};
  check_columns_args(c);
  Tensor mass = torch::stable::new_zeros(lse, {c.heads(), c.group(), c.rows()});
  auto* to = static_cast<float*>(mass.mutable_data_ptr());
  for_blocks(c, static_cast<float>(scale), [&](int64_t head, int64_t member, const Tiles& tiles, int64_t first) {
    std::unique_ptr<float[]> scratch(new float[kBlock * c.dim()]);
    ColumnArgs a = block_of(c, head, first);
    tiles.describe(a);
    a.scratch = scratch.get();
    a.mass = to + (head * c.group() + member) * c.rows() + first;
    kernels().mass(a);
  });
  return mass;
}

std::tuple<Tensor, Tensor> key_curvature(Tensor query, Tensor keys, Tensor values, Tensor log_n, Tensor position,
                                         Tensor query_position, Tensor lse, Tensor out, double scale) {
  const Columns c{query, keys, values, log_n, position, query_position, lse, out};
  check_columns_args(c);
  const int64_t dim = c.dim(), half = dim / 2;
  Tensor square = torch::stable::new_zeros(lse, {c.heads(), c.rows(), dim});
  Tensor product = torch::stable::new_zeros(lse, {c.heads(), c.rows(), half});
  auto *square_of = static_cast<float*>(square.mutable_data_ptr());
  auto *product_of = static_cast<float*>(product.mutable_data_ptr());
  for_blocks(c, static_cast<float>(scale), [&](int64_t head, int64_t, const Tiles& tiles, int64_t first) {
    std::unique_ptr<float[]> scratch(new float[2 * kBlock * dim]), sums(new float[kBlock * (dim + half)]());
    ColumnArgs a = block_of(c, head, first);
    tiles.describe(a);
    a.scratch = scratch.get();
    a.square = sums.get();
    a.product = sums.get() + kBlock * dim;
    kernels().curvature(a);
    float *squares = square_of + (head * c.rows() + first) * dim, *products = product_of + (head * c.rows() + first) * half;
    for (int64_t i = 0; i < a.rows * dim; ++i) squares[i] += a.square[i];
    for (int64_t i = 0; i < a.rows * half; ++i) products[i] += a.product[i];
  });
  return {square, product};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(asymkv, CPU, m) {
  m.impl("attention_mass", TORCH_BOX(&attention_mass));
  m.impl("key_curvature", TORCH_BOX(&key_curvature));
}

}  // namespace asymkv
