// Runs the kernels of kernels/csrc on the CPU. It reads calls from standard input, each a header and
// its arrays, and writes the resulting arrays. tests/kernels/emulated.py is the other side.

#include "device.h"
// device.h must come first: it replaces the CUDA features that these use.
#include "plan.cuh"
#include "softmax_loss.cuh"

#include <cstdio>
#include <cstdlib>

using namespace nudge;

enum What { whole_rows, scaling, planning, far_rows };

struct Header {
  int64_t what, type;  // What below; 0: float32, 1: bf16, 2: fp16
  int64_t keep, blocks, threads, grid;
  int64_t rows, vocabulary, stride, offset;  // offset: elements before the first row
  int64_t ignore_index, weighted, biased, scale_stride, differentiate;
  double smoothing, z_loss, softcap;
};

void fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  exit(2);
}

// Has exactly the requested length, 16-byte aligned, so that a sanitizer sees any read beyond it.
template <typename T>
struct Array {
  T* data;
  size_t count;

  explicit Array(size_t count) : count(count) {
    if (posix_memalign(reinterpret_cast<void**>(&data), 16, std::max<size_t>(count * sizeof(T), 1))) fail("memory");
  }
  Array(const Array&) = delete;
  ~Array() { free(data); }
  Array& read() {
    if (fread(data, sizeof(T), count, stdin) != count) fail("input ends early");
    return *this;
  }
  // NaN, so that a read of unwritten elements shows.
  Array& poison() {
    memset(static_cast<void*>(data), 0xff, count * sizeof(T));
    return *this;
  }
  void write() const { fwrite(data, sizeof(T), count, stdout); }
};

template <typename T, Kind kind>
void launch_kind(const Header& call, const Rows& rows) {
  int vectors = rows.vocabulary / Layout<T>::width;
  int kept = call.keep ? static_cast<int>((vectors + call.blocks - 1) / call.blocks) * 16 : 0;
  int shared = kScratch + kept;
  emulator::launch(call.grid, call.blocks, call.threads, shared, [&] {
    call.keep ? softmax_loss<T, kind, true>(rows) : softmax_loss<T, kind, false>(rows);
  });
}

template <typename T>
void softmax_loss_of(const Header& call) {
  // The memory between far rows is never touched, so it costs nothing.
  const bool far = call.what == far_rows;
  Array<T> logits(call.offset + (call.rows - 1) * call.stride + (far ? call.vocabulary : call.stride));
  Array<int64_t> targets(call.rows);
  Array<float> weight(call.weighted ? call.vocabulary : 0), bias(call.biased ? call.vocabulary : 0);
  Array<float> scale(call.scale_stride ? call.rows : 1), losses(call.rows), lse(call.rows);
  auto each_row = [&](auto use) {
    for (int64_t row = 0; row < call.rows; ++row) {
      if (use(logits.data + row * call.stride) != static_cast<size_t>(call.vocabulary)) fail("input ends early");
    }
  };
  if (far) {
    each_row([&](T* row) { return fread(row, sizeof(T), call.vocabulary, stdin); });
  } else {
    logits.read();
  }
  targets.read(), weight.read(), bias.read(), scale.read(), losses.poison(), lse.poison();
  Rows rows{logits.data + call.offset, call.stride, call.rows, static_cast<int>(call.vocabulary),
            targets.data, call.weighted ? weight.data : nullptr, call.biased ? bias.data : nullptr,
            scale.data, call.scale_stride, call.ignore_index, static_cast<float>(call.smoothing),
            static_cast<float>(call.z_loss), static_cast<float>(call.softcap), losses.data, lse.data,
            call.differentiate != 0};
  switch (kind_of(rows)) {
    case Kind::plain: launch_kind<T, Kind::plain>(call, rows); break;
    case Kind::softcap: launch_kind<T, Kind::softcap>(call, rows); break;
    case Kind::full: launch_kind<T, Kind::full>(call, rows); break;
  }
  if (far) {
    each_row([&](T* row) { return fwrite(row, sizeof(T), call.vocabulary, stdout); });
  } else {
    logits.write();
  }
  losses.write(), lse.write();
}

template <typename T>
void scale_of(const Header& call) {
  Array<T> value(call.offset + call.rows);
  Array<float> factor(1);
  value.read(), factor.read();
  emulator::launch(call.grid, 1, call.threads, 0,
                   [&] { scale_unless_one(value.data + call.offset, call.rows, factor.data); });
  value.write();
}

template <typename T>
void run(const Header& call) {
  call.what == scaling ? scale_of<T>(call) : softmax_loss_of<T>(call);
}

int main() {
  Header call;
  while (fread(&call, sizeof(call), 1, stdin) == 1) {
    if (call.what == planning) {
      Array<int64_t> device(5);
      device.read();
      int width = call.type == 0 ? 4 : 8;
      Plan made = plan(call.vocabulary / width, call.rows, kScratch, kMostThreads, kMostBlocks,
                       {static_cast<int>(device.data[0]), static_cast<int>(device.data[1]),
                        static_cast<int>(device.data[2]), static_cast<int>(device.data[3]),
                        static_cast<int>(device.data[4])},
                       static_cast<Path>(call.keep));
      Array<int64_t> answer(5);
      int64_t values[] = {made.keep, made.blocks, made.threads, made.grid, made.shared};
      memcpy(answer.data, values, sizeof(values));
      answer.write();
      continue;
    }
    switch (call.type) {
      case 0: run<float>(call); break;
      case 1: run<bf16>(call); break;
      case 2: run<fp16>(call); break;
      default: fail("unknown type");
    }
  }
}
