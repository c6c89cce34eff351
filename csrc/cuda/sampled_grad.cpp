// Family sampled_grad on CUDA: checks, workspace, launches. Nothing is read back.
#include "../binding/sampled_grad.h"

#include "bindings.h"
#include "device.h"
#include "launchers.h"

namespace partune {
namespace {

// Of the panels' workspace: an L2 cache holds it, and tensor cores are busy with that many rows.
constexpr int64_t kPanelBytes = int64_t(8) << 20;

const SampledGradLaunchers& launchers_of(const Tensor& grad) {
  switch (grad.scalar_type()) {
    case ScalarType::Double:
      return sampled_grad_float64;
    case ScalarType::Float:
      return sampled_grad_float32;
    case ScalarType::BFloat16:
      return sampled_grad_bfloat16;
    default:
      return sampled_grad_half;
  }
}

}  // namespace

void sampled_grad_cuda_(Tensor values, Tensor grad, Tensor input, Tensor crow_indices, Tensor col_indices,
                        std::string route) {
  const char* op = "sampled_grad_";
  const SampledGradCall call = sampled_grad_call(op, values, grad, input, crow_indices, col_indices, route);
  if (call.csr.nnz == 0 || call.tokens == 0) return;
  const DeviceScope scope(values.get_device_index());
  const cudaStream_t stream = current_stream(values.get_device_index());
  const SampledGradLaunchers& launchers = launchers_of(grad);
  const SampledGradTask task{call.grad.data, call.input.data,    call.grad.stride, call.input.stride,
                             call.tokens,    call.input.columns, call.csr,         call.values};
  if (call.panels) {
    for_panels(grad, input, kPanelBytes, [&](const void* panel, int64_t first, int64_t last) {
      check_launch(op, launchers.compact(task, panel, first, last, stream));
    });
    return;
  }
  Tensor workspace = torch::stable::empty({launchers.workspace_bytes(task)}, ScalarType::Byte, std::nullopt,
                                          values.device());
  const auto launch = call.side == 1 ? launchers.sampled : launchers.blocks;
  check_launch(op, launch(task, workspace.mutable_data_ptr(), stream));
}

}  // namespace partune
