// What the kernels of this folder share: torch's tensors, in and out.
#include <immintrin.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>

#define UNROLL _Pragma("GCC unroll 16")
#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has it under its old name only
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t LINE = 64;  // bytes of a cache line

// Straight to the allocator: through the dispatcher it would take longer than a small product.
Tensor empty(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType dtype) {
  int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.begin(), code, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

bool is_writable(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

template <typename T>
T* data(const Tensor& tensor, ScalarType dtype, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == count,
                  "qcompile_cpu needs ", name, " contiguous, of its dtype and size");
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data(const std::optional<Tensor>& tensor, ScalarType dtype, int64_t count, const char* name) {
  return tensor ? data<T>(*tensor, dtype, count, name) : nullptr;
}

}  // namespace
