// The hardware primitives of the kernels: number formats and vectors of them, a block's shared memory,
// and the thread-block cluster of sm_90. Tests compile softmax_loss.cuh as plain C++ against another
// file that defines the same names and runs each CUDA thread as a CPU thread.

#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// Two adjacent 16-bit elements in memory. The hardware rounds and packs them in one instruction,
// unpacks them in two and compares them in one.
__device__ inline uint32_t bits_of(__nv_bfloat162 pair) { return *reinterpret_cast<uint32_t*>(&pair); }
__device__ inline uint32_t bits_of(__half2 pair) { return *reinterpret_cast<uint32_t*>(&pair); }
__device__ inline uint32_t pack(bf16, float low, float high) { return bits_of(__floats2bfloat162_rn(low, high)); }
__device__ inline uint32_t pack(fp16, float low, float high) { return bits_of(__floats2half2_rn(low, high)); }
__device__ inline float2 unpack(bf16, uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ inline float2 unpack(fp16, uint32_t pair) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}
__device__ inline uint32_t larger(bf16, uint32_t a, uint32_t b) {
  return bits_of(__hmax2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b)));
}
__device__ inline uint32_t larger(fp16, uint32_t a, uint32_t b) {
  return bits_of(__hmax2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b)));
}

// Converts the 16 / sizeof(T) elements of a vector.
template <typename T>
__device__ inline void from_vector(uint4 vector, float* values) {
  if constexpr (sizeof(T) == 4) {
    memcpy(values, &vector, 16);
  } else {
    const uint32_t pairs[] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      const float2 pair = unpack(T{}, pairs[at]);
      values[2 * at] = pair.x;
      values[2 * at + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ inline uint4 to_vector(const float* values) {
  uint4 made;
  if constexpr (sizeof(T) == 4) {
    memcpy(&made, values, 16);
  } else {
    made = {pack(T{}, values[0], values[1]), pack(T{}, values[2], values[3]),
            pack(T{}, values[4], values[5]), pack(T{}, values[6], values[7])};
  }
  return made;
}

// The largest element of `count` vectors, ignoring NaN.
template <typename T, int count>
__device__ inline float largest_of(const uint4* vectors) {
  if constexpr (sizeof(T) == 4) {
    float most = -INFINITY;
#pragma unroll
    for (int at = 0; at < count; ++at) {
      float values[4];
      from_vector<T>(vectors[at], values);
      most = fmaxf(fmaxf(most, fmaxf(values[0], values[1])), fmaxf(values[2], values[3]));
    }
    return most;
  } else {
    uint32_t most = vectors[0].x;
#pragma unroll
    for (int at = 0; at < count; ++at) {
      most = larger(T{}, larger(T{}, most, vectors[at].x), vectors[at].y);
      most = larger(T{}, larger(T{}, most, vectors[at].z), vectors[at].w);
    }
    const float2 pair = unpack(T{}, most);
    return fmaxf(pair.x, pair.y);
  }
}

// A vector whose elements are all -inf.
template <typename T>
__device__ inline uint4 nothing() {
  constexpr uint32_t bits = std::is_same_v<T, float> ? 0xff800000u : std::is_same_v<T, bf16> ? 0xff80ff80u : 0xfc00fc00u;
  return {bits, bits, bits, bits};
}

// Copies a vector asynchronously from memory to shared memory. wait_groups waits for the copies that
// this thread started, in the order of their groups, until `under_way` groups are pending; the thread
// then sees the copied values.
__device__ inline void copy_async(uint4* to, const uint4* from) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int under_way>
__device__ inline void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(under_way) : "memory");
}

// 2^x: within two ulps for float32 data. For 16-bit data it is a single instruction, whose error (2e-7,
// and 0 below 2^-126) is far below the rounding of the stored values (4e-3, 5e-4).
template <typename T>
__device__ inline float exp2_of(float x) {
  if constexpr (sizeof(T) == 4) return exp2f(x);
  float made;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
  return made;
}

template <typename T>
__device__ inline float tanh_of(float x) {
  return sizeof(T) == 4 ? tanhf(x) : 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x));
}

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// The blocks of a cluster share one row, and each sends a T (16 bytes) to every block once. All threads
// of all blocks call open() long before any of them calls tell(), and call hear() before they exit.
// Arrivals are counted at the receiver (mbarrier, PTX ISA), so that no thread waits for the memory of
// the whole GPU, as a cluster barrier would (4 to 11 % of the kernel). Below sm_90 a cluster is one
// block, which has no one to exchange with.
constexpr int kMostBlocks = 8;  // the largest cluster that every sm_90 device takes

template <typename T>
struct Meeting {
  T from[kMostBlocks];
  alignas(16) uint64_t arrived;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline int cluster_blocks() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ inline uint32_t in_block(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

template <typename T>
__device__ inline void open(Meeting<T>& meeting) {
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&meeting.arrived)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();  // .aligned: all threads of a warp must execute it together
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Waits until every block of the cluster has called open().
__device__ inline void all_are_there() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <typename T>
__device__ inline void tell(Meeting<T>& meeting, const T& mine, int blocks, int rank) {
  static_assert(sizeof(T) == 16, "one store of four words");
  if (threadIdx.x == 0) {  // counts earlier arrivals from other blocks, too
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&meeting.arrived)),
                 "r"(blocks * 16) : "memory");
  }
  if (threadIdx.x < blocks) {
    uint4 words;
    memcpy(&words, &mine, 16);
    const int to = threadIdx.x;
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            in_block(shared_address(&meeting.from[rank]), to)),
        "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w),
        "r"(in_block(shared_address(&meeting.arrived), to)) : "memory");
  }
}

template <typename T>
__device__ inline void hear(Meeting<T>& meeting, int) {
  const uint32_t arrived = shared_address(&meeting.arrived);
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(arrived) : "memory");
}
#else
__device__ inline int cluster_blocks() { return 1; }
__device__ inline int cluster_rank() { return 0; }
template <typename T>
__device__ inline void open(Meeting<T>&) {}
__device__ inline void all_are_there() {}
template <typename T>
__device__ inline void tell(Meeting<T>&, const T&, int, int) {}
template <typename T>
__device__ inline void hear(Meeting<T>&, int) {}
#endif

}  // namespace nudge
