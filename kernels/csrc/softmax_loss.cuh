// Turns a chunk of logits [rows, V] into the loss of each row and, in place, its gradient.
//
// Per row, let z be the logits + bias after the soft cap, p = softmax(z), b_c = e w_c / V the share of
// class c under label smoothing e, B the sum of b_c, and a = (1 - e) w_y:
//
//   loss = a (lse - z_y) + B lse - sum b_c z_c + z_loss lse^2
//   d loss / d z_c = p_c (a + B + 2 z_loss lse) - b_c - a [c = y]
//
// Exponentials are powers of two, 2^(z log2(e) - c): a multiply-add and one more instruction each. c is
// the row's maximum times log2(e), rounded. Everything is centered on that same c, so large logits lose
// no precision. Sums run in a fixed order, so the same input gives the same bits.
//
// Either a row is read once into shared memory and written once (keep), distributed over the blocks of
// a cluster if one block's memory is too small. Or it is read twice, the second time mostly from L2 if
// the rows in flight fit there.

#pragma once

#ifndef NUDGE_EMULATED
#include "device.cuh"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace nudge {

constexpr int kWarp = 32;
constexpr int kMostThreads = 512;
constexpr int kMostWarps = kMostThreads / kWarp;

// The features that a launch compiles in: only the softmax, also a soft cap, or everything.
enum class Kind { plain, softcap, full };

// 16-byte vectors that a thread processes at a time. Without shared memory, these are also all of its
// loads in flight. 4 of the full kind do not fit in 64 registers.
template <Kind kind, bool keep>
constexpr int ahead_of = kind == Kind::full || keep ? 2 : 4;

constexpr int kUnderWay = 4;  // groups of that many vectors in flight to shared memory

struct Rows {
  void* logits;
  int64_t row_stride;  // in elements
  int64_t rows;
  int vocabulary;
  const int64_t* targets;
  const float* class_weight;  // or null
  const float* bias;          // or null
  const float* scale;
  int64_t scale_stride;  // 0 if all rows share one scale
  int64_t ignore_index;
  float smoothing;
  float z_loss;
  float softcap;
  float* losses;
  float* lse;
  bool differentiate;
};

inline Kind kind_of(const Rows& rows) {
  if (rows.bias || rows.smoothing > 0) return Kind::full;
  return rows.softcap > 0 ? Kind::softcap : Kind::plain;
}

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// The running sums of a part of a row: its maximum (top); relative to it, the sum of exponentials
// (total) and, in units of log2, of b_c z_c (smooth); and the sum of b_c (share).
struct alignas(16) Sums {
  float top, total, smooth, share;
};

// The layout of shared memory: first the scratch of the reductions, then the kept part of the row.
struct Scratch {
  float tops[kMostWarps];
  float totals[kMostWarps], smooths[kMostWarps], shares[kMostWarps];
  Meeting<Sums> meeting;
};
// The kept part starts on a 128-byte line, which saves 6 % of the kernel's time on an H200.
constexpr int kScratch = (sizeof(Scratch) + 127) / 128 * 128;

// A row of T as 16-byte vectors. Rows of an odd V have any alignment, so up to 15 bytes before the first
// vector and after the last are processed one element per thread.
template <typename T, typename Index = int>
struct Layout {
  static constexpr int width = 16 / sizeof(T);
  Index vectors;
  int head, loose;  // elements before the first vector; elements outside all vectors

  __device__ Layout(const T* row, Index count) {
    int to_boundary = static_cast<int>((16 - (reinterpret_cast<uintptr_t>(row) & 15)) & 15) / sizeof(T);
    head = to_boundary < count ? to_boundary : static_cast<int>(count);
    vectors = (count - head) / width;
    loose = static_cast<int>(count - vectors * width);
  }
  __device__ Index loose_column(int at) const { return at < head ? at : vectors * width + at; }
};

// The exponent (base 2) on which a row is centered; any value works if the row has only -inf.
__device__ inline float centre(float top) { return top == -INFINITY ? 0.0f : top * kLog2e; }

// The distance of a logit from that center: 0, or nearly 0, for the row's maximum.
__device__ inline float from_centre(float z, float middle) { return fmaf(z, kLog2e, -middle); }

// The factor that rescales a sum of exponentials from one maximum to a larger one.
template <typename T>
__device__ inline float shrink(float from, float to) {
  if (from == to) return 1.0f;
  return from == -INFINITY ? 0.0f : exp2_of<T>(centre(from) - centre(to));
}

template <typename T, Kind kind>
struct Row {
  const Rows& given;
  float weight_share;  // b_c of a class with weight 1
  float per_cap;

  __device__ explicit Row(const Rows& rows)
      : given(rows), weight_share(rows.smoothing / rows.vocabulary), per_cap(1.0f / rows.softcap) {}

  __device__ float share(int column) const {
    if (kind != Kind::full) return 0.0f;
    return given.class_weight ? weight_share * given.class_weight[column] : weight_share;
  }

  // The logit that enters the softmax; slope receives its derivative by the stored value.
  __device__ float logit(float z, int column, float* slope = nullptr) const {
    if (kind == Kind::full && given.bias) z += given.bias[column];
    if (kind == Kind::softcap || (kind == Kind::full && given.softcap > 0)) {
      float bent = tanh_of<T>(z * per_cap);
      if (slope) *slope = 1.0f - bent * bent;
      z = given.softcap * bent;
    }
    return z;
  }

  // Rescales the sums to a maximum of at least `top`.
  __device__ void raise(Sums& sums, float top) const {
    if (top > sums.top) {
      sums.total *= shrink<T>(sums.top, top);
      if (kind == Kind::full) sums.smooth += sums.share * (centre(sums.top) - centre(top));
      sums.top = top;
    }
  }

  template <int count>
  __device__ void absorb(Sums& sums, const float* stored, int column) const {
    float z[count], top = sums.top;
#pragma unroll
    for (int at = 0; at < count; ++at) {
      z[at] = logit(stored[at], column + at);
      top = fmaxf(top, z[at]);
    }
    raise(sums, top);
    const float middle = centre(top);
#pragma unroll
    for (int at = 0; at < count; ++at) {
      const float distance = from_centre(z[at], middle);
      sums.total += exp2_of<T>(distance);
      if (kind == Kind::full && given.smoothing > 0) {
        float part = share(column + at);
        sums.share += part;
        sums.smooth += part * distance;
      }
    }
  }

  // Like absorb, for several vectors at once; only for the plain kind.
  template <int count>
  __device__ void absorb_vectors(Sums& sums, const uint4* vectors) const {
    raise(sums, largest_of<T, count>(vectors));
    const float middle = centre(sums.top);
#pragma unroll
    for (int at = 0; at < count; ++at) {
      float z[Layout<T>::width], total = 0.0f;
      from_vector<T>(vectors[at], z);
#pragma unroll
      for (float each : z) total += exp2_of<T>(from_centre(each, middle));
      sums.total += total;
    }
  }
};

// Sums over all threads of the block; every thread gets the same bits. Uses two barriers.
template <typename T, Kind kind>
__device__ Sums reduce_block(Sums mine, Scratch& scratch) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  float top = mine.top;
  for (int step = kWarp / 2; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  if (lane == 0) scratch.tops[warp] = top;
  __syncthreads();
  for (int at = 0; at < warps; ++at) top = fmaxf(top, scratch.tops[at]);

  float total = mine.total * shrink<T>(mine.top, top);
  float smooth = mine.smooth + mine.share * (centre(mine.top) - centre(top)), share = mine.share;
  for (int step = kWarp / 2; step; step /= 2) {
    total += __shfl_xor_sync(~0u, total, step);
    if (kind == Kind::full) {
      smooth += __shfl_xor_sync(~0u, smooth, step);
      share += __shfl_xor_sync(~0u, share, step);
    }
  }
  if (lane == 0) {
    scratch.totals[warp] = total;
    scratch.smooths[warp] = smooth;
    scratch.shares[warp] = share;
  }
  __syncthreads();
  Sums all{top, 0.0f, 0.0f, 0.0f};
  for (int at = 0; at < warps; ++at) {
    all.total += scratch.totals[at];
    if (kind == Kind::full) {
      all.smooth += scratch.smooths[at];
      all.share += scratch.shares[at];
    }
  }
  return all;
}

// Sums over all blocks of the cluster; every block gets the same bits.
template <typename T, Kind kind>
__device__ Sums reduce_cluster(Sums mine, Meeting<Sums>& meeting, int blocks, int rank) {
  tell(meeting, mine, blocks, rank);
  hear(meeting, blocks);
  float top = -INFINITY;
  for (int at = 0; at < blocks; ++at) top = fmaxf(top, meeting.from[at].top);
  Sums all{top, 0.0f, 0.0f, 0.0f};
  for (int at = 0; at < blocks; ++at) {
    const Sums part = meeting.from[at];
    all.total += part.total * shrink<T>(part.top, top);
    if (kind == Kind::full) {
      all.smooth += part.smooth + part.share * (centre(part.top) - centre(top));
      all.share += part.share;
    }
  }
  return all;
}

// Without keep, a block processes rows blockIdx.x, blockIdx.x + gridDim.x and so on. With keep, a
// cluster processes only row blockIdx.x / blocks. blockDim.x is a multiple of kWarp.
template <typename T, Kind kind, bool keep>
__global__ void __launch_bounds__(kMostThreads, 2) softmax_loss(const Rows given) {
  constexpr int width = Layout<T>::width, kAhead = ahead_of<kind, keep>;
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared_memory());
  uint4* kept = reinterpret_cast<uint4*>(shared_memory() + kScratch);
  const int blocks = keep ? cluster_blocks() : 1, rank = keep ? cluster_rank() : 0;
  const int thread = threadIdx.x, threads = blockDim.x;
  const Row<T, kind> row_of(given);
  if (blocks > 1) open(scratch.meeting);

  for (int64_t row = blockIdx.x / blocks; row < given.rows; row += gridDim.x / blocks) {
    T* logits = static_cast<T*>(given.logits) + row * given.row_stride;
    const Layout<T> layout(logits, given.vocabulary);
    uint4* vectors = reinterpret_cast<uint4*>(logits + layout.head);
    const int part = (layout.vectors + blocks - 1) / blocks;
    const int first = part * rank, end = min(first + part, layout.vectors);
    const bool has_loose = rank == 0 && thread < layout.loose;
    const int loose_column = layout.loose_column(thread);
    const int64_t target = given.targets[row];

    if (target == given.ignore_index) {  // all blocks of the cluster take this branch
      if (rank == 0 && thread == 0) given.losses[row] = given.lse[row] = 0.0f;
      if (given.differentiate) {
        for (int at = first + thread; at < end; at += threads) vectors[at] = uint4{0, 0, 0, 0};
        if (has_loose) logits[loose_column] = from_float<T>(0.0f);
      }
      if (blocks > 1) all_are_there();
      continue;
    }

    const bool outside = target < 0 || target >= given.vocabulary;
    const int column_of_target = outside ? 0 : static_cast<int>(target);
    const float z_target = row_of.logit(to_float(logits[column_of_target]), column_of_target);
    float loose = 0.0f;
    Sums sums{-INFINITY, 0.0f, 0.0f, 0.0f};
    if (has_loose) {
      loose = to_float(logits[loose_column]);
      row_of.template absorb<1>(sums, &loose, loose_column);
    }
    const int stride = threads * kAhead;
    auto each_ahead = [&](int start, auto use) {
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int at = start + ahead * threads;
        use(at, ahead, at < end);
      }
    };
    auto fetch = [&](int start) {
      each_ahead(start, [&](int at, int, bool within) {
        if (within) copy_async(kept + (at - first), vectors + at);
      });
      end_group();
    };
    if (keep) {
      for (int times = 0; times < kUnderWay; ++times) fetch(first + thread + times * stride);
    }
    for (int start = first + thread; start < end; start += stride) {
      if (keep) wait_groups<kUnderWay - 1>();
      uint4 loaded[kAhead];
      each_ahead(start, [&](int at, int ahead, bool within) {
        loaded[ahead] = !within ? nothing<T>() : keep ? kept[at - first] : vectors[at];
      });
      if (keep) fetch(start + kUnderWay * stride);
      if (kind == Kind::plain) {
        row_of.template absorb_vectors<kAhead>(sums, loaded);
        continue;
      }
      each_ahead(start, [&](int at, int ahead, bool within) {
        float stored[width];
        from_vector<T>(loaded[ahead], stored);
        if (within) row_of.template absorb<width>(sums, stored, layout.head + at * width);
      });
    }
    sums = reduce_block<T, kind>(sums, scratch);
    if (blocks > 1) {
      all_are_there();
      sums = reduce_cluster<T, kind>(sums, scratch.meeting, blocks, rank);
    }
    sums.total += sums.top - sums.top;  // NaN if the maximum is infinite, as in torch

    // From here on, no thread reads what another thread writes.
    const float middle = centre(sums.top), log_total = log2f(sums.total);
    const float lse = (middle + log_total) * kLn2;
    const float hit = outside ? NAN
        : (1.0f - given.smoothing) * (given.class_weight ? given.class_weight[target] : 1.0f);
    const float factor = hit + sums.share;
    if (rank == 0 && thread == 0) {
      const float taken = hit == 0 ? 0.0f : hit * from_centre(z_target, middle);
      given.losses[row] = (factor * log_total - taken - sums.smooth) * kLn2 + given.z_loss * lse * lse;
      given.lse[row] = lse;
    }
    if (given.differentiate) {
      const float scale = given.scale[row * given.scale_stride];
      const float spread = (factor + 2.0f * given.z_loss * lse) * scale / sums.total;
      const float pull = hit * scale;
      auto gradient = [&](float stored, int column, bool is_target) {
        float slope = 1.0f;
        float z = row_of.logit(stored, column, &slope);
        float value = exp2_of<T>(from_centre(z, middle)) * spread;
        if (kind == Kind::full && given.smoothing > 0) value -= row_of.share(column) * scale;
        if (is_target) value -= pull;
        return kind == Kind::plain ? value : value * slope;
      };
      for (int start = first + thread; start < end; start += stride) {
        uint4 loaded[kAhead];
        each_ahead(start, [&](int at, int ahead, bool within) {
          if (within) loaded[ahead] = keep ? kept[at - first] : vectors[at];
        });
        each_ahead(start, [&](int at, int ahead, bool within) {
          if (!within) return;
          float stored[width], made[width];
          from_vector<T>(loaded[ahead], stored);
          const int column = layout.head + at * width;
#pragma unroll
          for (int e = 0; e < width; ++e) made[e] = gradient(stored[e], column + e, false);
          if (static_cast<unsigned>(column_of_target - column) < width) {  // only one vector of a row
#pragma unroll
            for (int e = 0; e < width; ++e) {
              if (column + e == column_of_target) made[e] = gradient(stored[e], column + e, true);
            }
          }
          vectors[at] = to_vector<T>(made);
        });
      }
      if (has_loose) {
        const bool is_target = loose_column == column_of_target;
        logits[loose_column] = from_float<T>(gradient(loose, loose_column, is_target));
      }
    }
  }
}

// value *= *factor; does nothing if the factor is 1.
template <typename T>
__global__ void __launch_bounds__(kMostThreads) scale_unless_one(T* value, int64_t count, const float* factor) {
  const float by = *factor;
  if (by == 1.0f) return;
  constexpr int width = Layout<T>::width;
  const Layout<T, int64_t> layout(value, count);
  uint4* vectors = reinterpret_cast<uint4*>(value + layout.head);
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  for (int64_t at = thread; at < layout.vectors; at += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint4 loaded = vectors[at];
    T made[width];
    memcpy(made, &loaded, 16);
    for (int e = 0; e < width; ++e) made[e] = from_float<T>(to_float(made[e]) * by);
    memcpy(&loaded, made, 16);
    vectors[at] = loaded;
  }
  if (thread < layout.loose) {
    T& element = value[layout.loose_column(static_cast<int>(thread))];
    element = from_float<T>(to_float(element) * by);
  }
}

}  // namespace nudge
