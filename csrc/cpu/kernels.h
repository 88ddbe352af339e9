// The inner loops of the CPU ops, and the choice among the instruction sets that they are compiled for.
#pragma once
#include <stdint.h>

namespace asymkv {

struct BFloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};
enum class Type { kFloat, kBFloat16, kHalf };

// Queries of one KV head over a piece of its rows. `out` is not normalised: sum of exp(logit - top) v.
struct AttendArgs {
  Type type;
  const float* query;            // [queries, dim], scale applied
  const void* keys;              // [rows, dim]
  const void* values;            // [rows, value_dim]
  const float* log_n;            // [rows] or null
  const int32_t* position;       // [rows] or null
  const int64_t* query_position;  // [queries], with position
  int64_t queries, rows, dim, value_dim;
  float* out;    // [queries, value_dim]
  float* top;    // [queries] largest logit, -inf where no row was seen
  float* total;  // [queries] sum of exp(logit - top)
};

// Queries of one query head, in tiles of Kernels::tile, over a block of at most kBlock rows.
constexpr int64_t kBlock = 64;
struct ColumnArgs {
  Type type;
  const void* keys;    // [rows, dim]
  const void* values;  // [rows, dim]; curvature only
  int64_t rows, dim;
  const float* log_n;            // [rows]
  const int32_t* position;       // [rows]
  int64_t tiles;
  const float* query;            // [tiles, dim, tile], scale applied
  const float* out;              // [tiles, dim, tile]; curvature only
  const float* out_square;       // [tiles, tile] |o|^2; curvature only
  const float* query_square;     // [tiles, tile, dim] q^2; curvature only
  const float* query_product;    // [tiles, tile, dim / 2] q_d q_(d + dim/2); curvature only
  const float* lse;              // [tiles, tile], +inf where a query counts for nothing
  const int64_t* query_position;  // [tiles, tile]
  const int64_t* last_position;   // [tiles] the largest of a tile
  float* scratch;  // [2 * kBlock * dim]
  float* mass;     // [rows], added to; mass only
  float* square;   // [kBlock, dim], added to; curvature only
  float* product;  // [kBlock, dim / 2], added to; curvature only
};

struct Kernels {
  const char* name;
  int64_t tile;  // queries that the column sums take at a time
  void (*attend)(const AttendArgs&);
  void (*mass)(const ColumnArgs&);
  void (*curvature)(const ColumnArgs&);
  // Cosine and sine of position * inv_freq, the product formed in fp32.
  void (*angles)(float position, const float* inv_freq, int64_t count, float* cos, float* sin);
};

// The fastest that this machine runs; ASYMKV_CPU_ISA=default|v3|v4 asks for a slower one.
const Kernels& kernels();

}  // namespace asymkv
