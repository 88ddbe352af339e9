#include "append.cuh"

#include <torch/csrc/stable/library.h>

namespace asymkv {
STABLE_TORCH_LIBRARY_IMPL(asymkv, CUDA, m) { m.impl("ragged_append_", TORCH_BOX(&append_on_device)); }
}  // namespace asymkv
