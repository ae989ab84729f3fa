// The operators that torch registers, against its stable ABI: nothing here depends on the version of
// torch or Python, or on a CUDA build of torch.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "plan.cuh"
#include "softmax_loss.cuh"

// Weak, because a CPU-only torch lacks this symbol and the library must load there, too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace nudge {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "nudge_kernels: ", what, ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "nudge_kernels: this torch was built without CUDA; install a CUDA build of torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "reading a device attribute");
  return value;
}

Device describe(int device) {
  return {attribute(cudaDevAttrComputeCapabilityMajor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          attribute(cudaDevAttrL2CacheSize, device)};
}

template <typename T, Kind kind, bool keep>
bool launch_as(const Rows& rows, const Plan& plan, cudaStream_t stream) {
  auto kernel = softmax_loss<T, kind, keep>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared),
        "asking for shared memory");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = plan.grid;
  config.blockDim = plan.threads;
  config.dynamicSmemBytes = plan.shared;
  config.stream = stream;
  if (plan.blocks > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
    int fit = 0;  // 0 on a slice of a GPU that is smaller than the cluster
    check(cudaOccupancyMaxActiveClusters(&fit, kernel, &config), "asking for clusters");
    if (fit == 0) return false;
  }
  check(cudaLaunchKernelEx(&config, kernel, rows), "launching softmax_loss");
  return true;
}

template <typename T, Kind kind>
void launch_kind(const Rows& rows, int device, Path path) {
  const Device found = describe(device);
  const cudaStream_t stream = current_stream(device);
  const int vectors = rows.vocabulary / Layout<T>::width;
  for (Path now : {path, Path::two_pass}) {
    const Plan chosen = plan(vectors, rows.rows, kScratch, kMostThreads, kMostBlocks, found, now);
    STD_TORCH_CHECK(chosen.threads > 0, "nudge_kernels: path one-pass: a row of ", rows.vocabulary,
                    " logits does not fit the shared memory of a cluster of this GPU");
    if (chosen.keep ? launch_as<T, kind, true>(rows, chosen, stream)
                    : launch_as<T, kind, false>(rows, chosen, stream)) {
      return;
    }
  }
}

template <typename T>
void launch(const Rows& rows, int device, Path path) {
  switch (kind_of(rows)) {
    case Kind::plain: return launch_kind<T, Kind::plain>(rows, device, path);
    case Kind::softcap: return launch_kind<T, Kind::softcap>(rows, device, path);
    case Kind::full: return launch_kind<T, Kind::full>(rows, device, path);
  }
}

// Calls `use` with a value of the element type of `like`.
template <typename Use>
void with_type(const Tensor& like, Use use) {
  switch (like.scalar_type()) {
    case ScalarType::Float: return use(float{});
    case ScalarType::Half: return use(fp16{});
    case ScalarType::BFloat16: return use(bf16{});
    default: STD_TORCH_CHECK(false, "nudge_kernels: expected float32, float16 or bfloat16");
  }
}

void check_vector(const Tensor& value, const char* name, int64_t size, ScalarType type, const Tensor& like) {
  STD_TORCH_CHECK(value.dim() == 1 && value.size(0) == size && value.scalar_type() == type &&
                      value.get_device_index() == like.get_device_index() && value.is_cuda() &&
                      (size < 2 || value.stride(0) == 1),
                  "nudge_kernels: ", name, ": expected a contiguous ",
                  type == ScalarType::Long ? "int64" : "float32", " [", size, "] on the logits' device");
}

void softmax_loss_(Tensor logits, Tensor targets, std::optional<Tensor> class_weight,
                   std::optional<Tensor> bias, Tensor scale, int64_t ignore_index,
                   double label_smoothing, double z_loss, double logit_softcap, Tensor losses,
                   Tensor lse, bool differentiate, int64_t path) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_cuda() && logits.size(1) < INT32_MAX &&
                      (logits.size(1) < 2 || logits.stride(1) == 1),
                  "nudge_kernels: logits: expected [rows, V] on a GPU, each row contiguous");
  STD_TORCH_CHECK(path >= 0 && path <= 2, "nudge_kernels: path ", path, ": expected 0, 1 or 2");
  const int64_t count = logits.size(0), vocabulary = logits.size(1);
  if (count == 0 || vocabulary == 0) return;
  STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == count && scale.is_cuda() &&
                      scale.get_device_index() == logits.get_device_index() &&
                      scale.scalar_type() == ScalarType::Float,
                  "nudge_kernels: scale: expected float32 [", count, "] on the logits' device");
  check_vector(targets, "targets", count, ScalarType::Long, logits);
  check_vector(losses, "losses", count, ScalarType::Float, logits);
  check_vector(lse, "lse", count, ScalarType::Float, logits);
  if (class_weight) check_vector(*class_weight, "class_weight", vocabulary, ScalarType::Float, logits);
  if (bias) check_vector(*bias, "bias", vocabulary, ScalarType::Float, logits);

  Rows rows{};
  rows.logits = logits.mutable_data_ptr();
  rows.row_stride = logits.stride(0);
  rows.rows = count;
  rows.vocabulary = static_cast<int>(vocabulary);
  rows.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  if (class_weight) rows.class_weight = static_cast<const float*>(class_weight->const_data_ptr());
  if (bias) rows.bias = static_cast<const float*>(bias->const_data_ptr());
  rows.scale = static_cast<const float*>(scale.const_data_ptr());
  rows.scale_stride = scale.stride(0);
  rows.ignore_index = ignore_index;
  rows.smoothing = static_cast<float>(label_smoothing);
  rows.z_loss = static_cast<float>(z_loss);
  rows.softcap = static_cast<float>(logit_softcap);
  rows.losses = static_cast<float*>(losses.mutable_data_ptr());
  rows.lse = static_cast<float*>(lse.mutable_data_ptr());
  rows.differentiate = differentiate;

  const int device = logits.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  with_type(logits, [&](auto type) {
    launch<decltype(type)>(rows, device, static_cast<Path>(path));
  });
}

void scale_unless_one_(Tensor value, Tensor factor) {
  STD_TORCH_CHECK(value.is_cuda() && value.is_contiguous(),
                  "nudge_kernels: value: expected a contiguous tensor on a GPU");
  STD_TORCH_CHECK(factor.is_cuda() && factor.numel() == 1 && factor.scalar_type() == ScalarType::Float &&
                      factor.get_device_index() == value.get_device_index(),
                  "nudge_kernels: factor: expected one float32 on the value's device");
  const int64_t count = value.numel();
  if (count == 0) return;
  const int device = value.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const int64_t wanted = (count + kMostThreads * 8 - 1) / (kMostThreads * 8);
  const int blocks = static_cast<int>(
      std::min<int64_t>(wanted, attribute(cudaDevAttrMultiProcessorCount, device) * 4));
  with_type(value, [&](auto type) {
    using T = decltype(type);
    scale_unless_one<T><<<blocks, kMostThreads, 0, stream>>>(
        static_cast<T*>(value.mutable_data_ptr()), count,
        static_cast<const float*>(factor.const_data_ptr()));
    check(cudaGetLastError(), "launching scale_unless_one");
  });
}

}  // namespace
}  // namespace nudge

STABLE_TORCH_LIBRARY(nudge_kernels, library) {
  library.def(
      "softmax_loss_(Tensor(a!) logits, Tensor targets, Tensor? class_weight, Tensor? bias, "
      "Tensor scale, int ignore_index, float label_smoothing, float z_loss, float logit_softcap, "
      "Tensor(b!) losses, Tensor(c!) lse, bool differentiate, int path) -> ()");
  library.def("scale_unless_one_(Tensor(a!) value, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nudge_kernels, CUDA, library) {
  library.impl("softmax_loss_", TORCH_BOX(&nudge::softmax_loss_));
  library.impl("scale_unless_one_", TORCH_BOX(&nudge::scale_unless_one_));
}

#define NUDGE_TEXT_OF(value) #value
#define NUDGE_TEXT(value) NUDGE_TEXT_OF(value)

// The build record: version, sources, architectures and compiler.
extern "C" __attribute__((visibility("default"))) const char* nudge_kernels_stamp() {
  return "version=" NUDGE_VERSION ";sources=" NUDGE_SOURCES ";architectures=" NUDGE_ARCHITECTURES
         ";nvcc=" NUDGE_TEXT(__CUDACC_VER_MAJOR__) "." NUDGE_TEXT(__CUDACC_VER_MINOR__)
         "." NUDGE_TEXT(__CUDACC_VER_BUILD__);
}

// Why the kernels cannot run on a device, in CUDA's words, or null if they can.
extern "C" __attribute__((visibility("default"))) const char* nudge_kernels_why_not(int device) {
  if (!aoti_torch_get_current_cuda_stream) return "this torch was built without CUDA";
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, nudge::scale_unless_one<float>);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // clear the error, so that torch does not report it
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
