// The CUDA ops' own kernels and host code, run on CPU tensors thread after thread, as torch.ops.asymkv_cuda_on_cpu.
#define ASYMKV_CUDA_ON_CPU
#include <torch/csrc/stable/library.h>

#include "../../csrc/cuda/append.cuh"
#include "../../csrc/cuda/compact.cuh"

STABLE_TORCH_LIBRARY(asymkv_cuda_on_cpu, m) {
  m.def(
      "ragged_append_(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) cardinality, Tensor(d!) log_n, "
      "Tensor(e!) position, Tensor(f!) length, Tensor start, Tensor capacity, Tensor new_keys, Tensor new_values, "
      "Tensor new_position, Tensor? new_cardinality=None, Tensor? counts=None) -> ()");
  m.def(
      "ragged_compact(Tensor keys, Tensor values, Tensor cardinality, Tensor position, Tensor rotary, "
      "Tensor[] statistics, Tensor? key_weight, Tensor order, Tensor offset, Tensor inv_freq, "
      "Tensor? target_rotary, Tensor out_start, Tensor(a!) out_keys, Tensor(b!) out_values, "
      "Tensor(c!) out_cardinality, Tensor(d!) out_log_n, Tensor(e!) out_position, "
      "Tensor(f!)[] out_statistics) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(asymkv_cuda_on_cpu, CPU, m) {
  m.impl("ragged_append_", TORCH_BOX(&asymkv::append_on_device));
  m.impl("ragged_compact", TORCH_BOX(&asymkv::compact_on_device));
}
