// Defines the names of kernels/csrc/device.cuh and of CUDA for a C++ compiler. Every CUDA thread is a
// CPU thread, __syncthreads and shuffles use std::barrier, and the blocks of a cluster run in parallel
// with shared memory that the others can read. Sanitizers see all of it.

#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#define NUDGE_EMULATED
#define __device__
#define __global__
#define __launch_bounds__(...)

struct Index {
  int x;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

using Barrier = std::barrier<>;

struct Block {
  std::vector<uint4> shared;
  Barrier threads;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<float> shuffled;
  std::atomic<int> heard{0};  // number of blocks that have sent to this one

  Block(int threads, int shared_bytes)
      : shared(shared_bytes / 16), threads(threads), shuffled(threads) {
    for (int at = 0; at < threads; at += 32) warps.push_back(std::make_unique<Barrier>(32));
    forget();
  }

  // Fills shared memory with NaN, before the block starts and as soon as its last thread has exited,
  // even if other blocks of the cluster still read it.
  void forget() {
    memset(shared.data(), 0xff, shared.size() * sizeof(uint4));
    heard = 0;
  }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier threads;

  Cluster(int blocks_in_it, int threads_a_block, int shared_bytes) : threads(blocks_in_it * threads_a_block) {
    for (int at = 0; at < blocks_in_it; ++at) {
      blocks.push_back(std::make_unique<Block>(threads_a_block, shared_bytes));
    }
  }
};

inline thread_local Cluster* cluster;
inline thread_local int rank;
inline thread_local std::optional<Barrier::arrival_token> arrived;

inline void expect(bool holds, const char* else_what) {
  if (!holds) {
    fprintf(stderr, "%s\n", else_what);
    std::_Exit(3);
  }
}

inline Block& block() { return *cluster->blocks[rank]; }

// Runs the kernel over `grid` blocks, one cluster at a time.
template <typename Kernel>
void launch(int grid, int blocks, int threads, int shared_bytes, Kernel kernel) {
  Cluster all(blocks, threads, shared_bytes);
  std::vector<std::thread> running;
  for (int number = 0; number < blocks * threads; ++number) {
    running.emplace_back([&, number] {
      cluster = &all;
      rank = number / threads;
      threadIdx.x = number % threads;
      blockDim.x = threads;
      gridDim.x = grid;
      for (int first = 0; first < grid; first += blocks) {
        blockIdx.x = first + rank;
        kernel();
        expect(!arrived, "a thread exits without having waited for its cluster");
        block().threads.arrive_and_wait();
        if (threadIdx.x == 0) block().forget();
        all.threads.arrive_and_wait();
      }
    });
  }
  for (std::thread& one : running) one.join();
}

}  // namespace emulator

inline void __syncthreads() { emulator::block().threads.arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int step) {
  emulator::Block& block = emulator::block();
  emulator::Barrier& warp = *block.warps[threadIdx.x / 32];
  block.shuffled[threadIdx.x] = value;
  warp.arrive_and_wait();
  float other = block.shuffled[threadIdx.x ^ step];
  warp.arrive_and_wait();
  return other;
}

namespace nudge {

using std::min;

struct bf16 {
  uint16_t bits;
};
using fp16 = _Float16;

inline float to_float(float value) { return value; }
inline float to_float(fp16 value) { return static_cast<float>(value); }
inline float to_float(bf16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

template <typename T>
T from_float(float value) {
  return static_cast<T>(value);
}
template <>
inline bf16 from_float<bf16>(float value) {
  if (std::isnan(value)) return {0x7fff};
  uint32_t bits = std::bit_cast<uint32_t>(value);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <typename T>
void from_vector(uint4 vector, float* values) {
  T elements[16 / sizeof(T)];
  memcpy(elements, &vector, 16);
  for (T element : elements) *values++ = to_float(element);
}

template <typename T>
uint4 to_vector(const float* values) {
  T elements[16 / sizeof(T)];
  for (T& element : elements) element = from_float<T>(*values++);
  uint4 made;
  memcpy(&made, elements, 16);
  return made;
}

template <typename T, int count>
float largest_of(const uint4* vectors) {
  float most = -INFINITY, values[16 / sizeof(T)];
  for (int at = 0; at < count; ++at) {
    from_vector<T>(vectors[at], values);
    for (float value : values) most = fmaxf(most, value);
  }
  return most;
}

template <typename T>
uint4 nothing() {
  float values[16 / sizeof(T)];
  std::fill(std::begin(values), std::end(values), -INFINITY);
  return to_vector<T>(values);
}

// Copies take effect only when they are waited for.
struct Copy {
  uint4* to;
  const uint4* from;
};
inline thread_local std::vector<Copy> begun;
inline thread_local std::deque<std::vector<Copy>> groups;

inline void copy_async(uint4* to, const uint4* from) { begun.push_back({to, from}); }
inline void end_group() { groups.push_back(std::exchange(begun, {})); }
template <int under_way>
void wait_groups() {
  for (; groups.size() > under_way; groups.pop_front()) {
    for (Copy copy : groups.front()) *copy.to = *copy.from;
  }
}

template <typename T>
float exp2_of(float x) {
  return exp2f(x);
}
template <typename T>
float tanh_of(float x) {
  return tanhf(x);
}

inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(emulator::block().shared.data());
}

inline int cluster_blocks() { return static_cast<int>(emulator::cluster->blocks.size()); }
inline int cluster_rank() { return emulator::rank; }

constexpr int kMostBlocks = 8;

template <typename T>
struct Meeting {
  T from[kMostBlocks];
  alignas(16) uint64_t unused;
};

template <typename T>
void open(Meeting<T>&) {
  emulator::arrived = emulator::cluster->threads.arrive();
}
inline void all_are_there() {
  emulator::cluster->threads.wait(std::move(*emulator::arrived));
  emulator::arrived.reset();
}
template <typename T>
void tell(Meeting<T>& meeting, const T& mine, int blocks, int rank) {
  emulator::expect(!emulator::arrived, "a thread sends to blocks that may not have started");
  if (threadIdx.x >= blocks) return;
  emulator::Block& block = *emulator::cluster->blocks[threadIdx.x];
  const auto offset = reinterpret_cast<unsigned char*>(&meeting.from[rank]) - shared_memory();
  memcpy(reinterpret_cast<unsigned char*>(block.shared.data()) + offset, &mine, sizeof(T));
  block.heard.fetch_add(1);
  block.heard.notify_all();
}
template <typename T>
void hear(Meeting<T>&, int blocks) {
  std::atomic<int>& heard = emulator::block().heard;
  for (int now = heard; now < blocks; now = heard) heard.wait(now);
}

}  // namespace nudge
