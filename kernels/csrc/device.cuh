// What the kernels ask of the hardware, by name: 16-byte vectors, number formats, a block's shared
// memory, and the thread-block cluster of sm_90. Tests compile softmax_loss.cuh as plain C++ with
// another file of these names in place of this one, a thread of the processor per CUDA thread.

#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nudge {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bf16 value) { return __bfloat162float(value); }
__device__ inline float to_float(fp16 value) { return __half2float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) { return value; }
template <>
__device__ inline bf16 from_float<bf16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ inline fp16 from_float<fp16>(float value) { return __float2half_rn(value); }

// The exact functions for float32 data; for 16 bits the fast ones, whose error (1e-6) is far below
// the rounding of what is stored (4e-3, 5e-4).
template <typename T>
__device__ inline float exp_of(float x) {
  return sizeof(T) == 4 ? expf(x) : __expf(x);
}

template <typename T>
__device__ inline float tanh_of(float x) {
  return sizeof(T) == 4 ? tanhf(x) : 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x));
}

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// The blocks of a cluster keep one row between them. Below sm_90 a cluster is one block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline int cluster_blocks() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
// .aligned: all threads of a warp must come together, also after a branch that only some took.
__device__ inline void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <typename T>
__device__ inline const T* in_block(T* mine, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
}
#else
__device__ inline int cluster_blocks() { return 1; }
__device__ inline int cluster_rank() { return 0; }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {}
template <typename T>
__device__ inline const T* in_block(T* mine, int) { return mine; }
#endif

}  // namespace nudge
