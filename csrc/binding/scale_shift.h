// From tensors to layouts and vectors: what the CPU and the CUDA binding of family scale_shift share.
#pragma once
#include <string>
#include <tuple>

#include "../kernels/scale_shift.h"
#include "checks.h"

namespace partune {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;

inline Activation activation_of(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  STD_TORCH_CHECK(name == "gelu_tanh", op, ": activation must be 'none', 'gelu' or 'gelu_tanh', got '", name,
                  "'");
  return Activation::kGeluTanh;
}

// Whether memory holds [batch, spatial..., channels] of a tensor of [batch, channels, spatial...].
inline bool is_channels_last(const Tensor& tensor) {
  int64_t wanted = 1;
  const auto follows = [&](int64_t dim) {
    const bool fits = tensor.size(dim) == 1 || tensor.stride(dim) == wanted;
    wanted *= tensor.size(dim);
    return fits;
  };
  if (tensor.dim() < 4 || !follows(1)) return false;
  for (int64_t dim = tensor.dim() - 1; dim >= 2; --dim) {
    if (!follows(dim)) return false;
  }
  return follows(0);
}

inline ChannelLayout layout_of(const char* op, const char* name, const Tensor& tensor, int64_t channel_dim) {
  check_dtype(op, name, tensor,
              {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  STD_TORCH_CHECK(channel_dim == -1 || channel_dim == 1, op, ": channel_dim must be -1 or 1, got ",
                  channel_dim);
  const int64_t channel = channel_dim == -1 ? tensor.dim() - 1 : 1;
  STD_TORCH_CHECK(channel >= 0 && channel < tensor.dim(), op, ": ", name, " has too few dimensions, ",
                  tensor.dim());
  ChannelLayout layout{1, tensor.size(channel), 1};
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (dim < channel) layout.outer *= tensor.size(dim);
    if (dim > channel) layout.inner *= tensor.size(dim);
  }
  if (!tensor.is_contiguous()) {
    STD_TORCH_CHECK(channel_dim == 1 && is_channels_last(tensor), op, ": ", name,
                    " must be contiguous, or channels-last with channel_dim 1");
    layout.outer *= layout.inner;
    layout.inner = 1;
  }
  return layout;
}

inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  check_dtype(op, name, tensor, {like.scalar_type()});
  STD_TORCH_CHECK(tensor.device() == like.device() && tensor.dim() == like.dim(), op, ": ", name,
                  " must have the gradient's shape and device");
  for (int64_t dim = 0; dim < like.dim(); ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) == like.size(dim) &&
                        (like.size(dim) == 1 || like.numel() == 0 || tensor.stride(dim) == like.stride(dim)),
                    op, ": ", name, " must have the gradient's shape and layout");
  }
}

// A vector of the tensor's dtype, or of float32 beside a 16-bit one.
inline void check_channels(const char* op, const char* name, const Tensor& vector, const Tensor& like,
                           int64_t channels) {
  const ScalarType dtype = like.scalar_type();
  const bool narrow = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  check_vector(op, name, vector, like, {dtype, narrow ? ScalarType::Float : dtype}, channels);
}

inline void check_channels(const char* op, const char* name, const OptionalTensor& vector, const Tensor& like,
                           int64_t channels) {
  if (vector) check_channels(op, name, *vector, like, channels);
}

// The vectors that scale, and shift of scale's dtype.
inline void check_scale(const char* op, const Tensor& scale, const OptionalTensor& shift, const Tensor& like,
                        int64_t channels) {
  check_channels(op, "scale", scale, like, channels);
  check_channels(op, "shift", shift, like, channels);
  if (shift) check_dtype(op, "shift", *shift, {scale.scalar_type()});
}

inline void check_backward(const char* op, const Tensor& grad, const OptionalTensor& saved,
                           const Tensor& scale, const OptionalTensor& shift, const OptionalTensor& bias,
                           int64_t channels, Activation activation, bool from_output, bool scale_grad) {
  check_scale(op, scale, shift, grad, channels);
  check_channels(op, "bias", bias, grad, channels);
  STD_TORCH_CHECK(!from_output || activation == Activation::kNone, op,
                  ": from_output is for no activation alone");
  STD_TORCH_CHECK(saved || (!scale_grad && activation == Activation::kNone), op, ": saved is missing");
  if (saved) check_like(op, "saved", *saved, grad);
}

// A number per row of a norm.
inline void check_statistic(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                            int64_t rows) {
  check_dtype(op, name, tensor,
              {like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float});
  STD_TORCH_CHECK(tensor.device() == like.device() && tensor.numel() == rows && tensor.is_contiguous(), op,
                  ": ", name, " must hold a contiguous number per row, ", rows, " in all");
}

}  // namespace partune
