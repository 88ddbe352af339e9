// What every CUDA op needs: the current stream, a device guard, and a grid that covers any number of items.
//
// Kernels in here need no shared memory and no warp intrinsics: their bodies run unchanged on the CPU, thread after
// thread, which is how they are tested where there is no GPU (tests/ops/cuda_on_cpu.cpp).
#pragma once
#include <cstdint>

#ifdef ASYMKV_CUDA_ON_CPU
struct Index {
  int64_t x;
};
static thread_local Index blockIdx, blockDim, gridDim, threadIdx;
#define __global__ static
#define __device__
inline void __syncthreads() {}
#define ASYMKV_LAUNCH(kernel, items, tensor, ...)                          \
  do {                                                                     \
    blockDim.x = asymkv::kThreads;                                         \
    gridDim.x = 3;                                                         \
    if ((items) > 0)                                                       \
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)           \
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(__VA_ARGS__); \
  } while (0)
namespace asymkv {
constexpr int kThreads = 4;
struct OnDevice {
  template <typename T>
  explicit OnDevice(const T&) {}
};
}  // namespace asymkv
struct int4 {
  int x, y, z, w;
};
#else
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../checks.h"

namespace asymkv {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // further items are reached by striding over the grid

struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  explicit OnDevice(const Tensor& x) : guard(x.get_device_index()) {}
};

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline unsigned blocks_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace asymkv

#define ASYMKV_LAUNCH(kernel, items, tensor, ...)                                                     \
  do {                                                                                                \
    if ((items) > 0) {                                                                                \
      kernel<<<asymkv::blocks_for(items), asymkv::kThreads, 0, asymkv::current_stream(tensor)>>>(__VA_ARGS__); \
      STD_CUDA_KERNEL_LAUNCH_CHECK();                                                                 \
    }                                                                                                 \
  } while (0)
#endif

// Items first, first + step, ... of this thread.
#define ASYMKV_FOR_ITEMS(i, items)                                                     \
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < (items); \
       i += int64_t(gridDim.x) * blockDim.x)
