// Decides how a chunk of rows is distributed over a device. Plain C++, tested without a GPU.

#pragma once

#include <algorithm>
#include <cstdint>

namespace nudge {

struct Device {
  int major;  // compute capability
  int processors;
  int shared_per_block, shared_per_processor, l2;  // bytes
};

struct Plan {
  bool keep;  // read rows once, into shared memory
  int blocks;  // per cluster; they share a row
  int threads, grid, shared;
};

enum class Path { automatic = 0, two_pass = 1, one_pass = 2 };

constexpr int kReserved = 1024;  // bytes of each block's shared memory that the system reserves
constexpr int kThreadsOfProcessor = 1024;  // with 64 registers each

inline Plan two_passes(int row_bytes, int64_t rows, int scratch, const Device& device, int threads) {
  // As many rows in flight as L2 can cache until their second read, with 1 to 4 blocks per processor.
  int64_t fit = device.l2 / std::max(row_bytes, 1) / device.processors;
  int64_t grid = std::min(rows, std::clamp<int64_t>(fit, 1, 4) * device.processors);
  return {false, 1, threads, static_cast<int>(grid), scratch};
}

// A row has at most `vectors` full 16-byte vectors. Returns threads == 0 if `path` is impossible.
inline Plan plan(int vectors, int64_t rows, int scratch, int most_threads, int most_blocks,
                 const Device& device, Path path) {
  auto threads_for = [&](int part) { return std::clamp((part + 31) / 32 * 32, 32, most_threads); };
  Plan twice = two_passes(vectors * 16, rows, scratch, device, threads_for(vectors));
  if (path == Path::two_pass) return twice;
  const int most = device.major >= 9 ? most_blocks : 1;
  // With two blocks per processor, one can load while the other stores.
  for (int resident = 2; resident >= 1; --resident) {
    // A single block per processor stalls while it stores; clusters on sm_90 make that case rare.
    if (resident == 1 && path == Path::automatic && device.major < 9) break;
    const int limit = std::min(device.shared_per_block, device.shared_per_processor / resident - kReserved);
    for (int blocks = 1; blocks <= most; blocks *= 2) {
      const int part = (vectors + blocks - 1) / blocks;
      const int64_t shared = scratch + int64_t{part} * 16;
      if (shared <= limit && rows * blocks <= INT32_MAX) {
        // The more blocks fit on a processor, the fewer threads each of them needs.
        const int64_t beside = device.shared_per_processor / (shared + kReserved);
        const int threads = static_cast<int>(std::max<int64_t>(kThreadsOfProcessor / beside / 128 * 128, 128));
        return {true, blocks, std::min(threads, threads_for(part)), static_cast<int>(rows * blocks),
                static_cast<int>(shared)};
      }
    }
  }
  if (path == Path::one_pass) return {};
  return twice;
}

}  // namespace nudge
