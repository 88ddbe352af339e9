// One instruction set's kernels; the including file defines ASYMKV_ISA, its name and ASYMKV_LANES.
#pragma once
#include "attend.h"
#include "columns.h"

namespace asymkv {
namespace ASYMKV_ISA {

// sin and cos to 1e-7; the angle is reduced in fp64, so that positions of a million still turn by the right angle.
static void angles(float position, const float* inv_freq, int64_t count, float* cos, float* sin) {
  for (int64_t i = 0; i < count; ++i) {
    const double angle = double(position * inv_freq[i]);
    const double turns = (angle * 0.63661977236758134 + 6755399441055744.0) - 6755399441055744.0;
    const float r = float((angle - turns * 1.5707963267948966) - turns * 6.123233995736766e-17), r2 = r * r;
    const int quarter = int(int64_t(turns) & 3);
    float s = -1.9515295891e-4f;
    s = s * r2 + 8.3321608736e-3f;
    s = s * r2 - 1.6666654611e-1f;
    s = s * r2 * r + r;
    float c = 2.443315711809948e-5f;
    c = c * r2 - 1.388731625493765e-3f;
    c = c * r2 + 4.166664568298827e-2f;
    c = c * r2 * r2 - 0.5f * r2 + 1.0f;
    const float odd_sin = quarter & 1 ? c : s, odd_cos = quarter & 1 ? s : c;
    sin[i] = quarter & 2 ? -odd_sin : odd_sin;
    cos[i] = (quarter + 1) & 2 ? -odd_cos : odd_cos;
  }
}

extern const Kernels kernels = {ASYMKV_ISA_NAME, kTile, attend, mass, curvature, angles};

}  // namespace ASYMKV_ISA
}  // namespace asymkv
