#include "compact.cuh"

#include <torch/csrc/stable/library.h>

namespace asymkv {
STABLE_TORCH_LIBRARY_IMPL(asymkv, CUDA, m) { m.impl("ragged_compact", TORCH_BOX(&compact_on_device)); }
}  // namespace asymkv
