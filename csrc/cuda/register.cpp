// Registration of the CUDA kernels by a call, so that a machine whose driver or GPU doesn't fit keeps
// torch's CUDA key free for another backend.
#include "bindings.h"
#include "device.h"

namespace partune {

void register_cuda() {
  using torch::stable::detail::StableLibrary;
  // Never destroyed: kernels stay registered for the life of the process.
  static StableLibrary* const library = [] {
    auto* made = new StableLibrary(StableLibrary::Kind::IMPL, "partune", "CUDA", __FILE__, __LINE__);
    implement_cuda_ops(*made);
    return made;
  }();
  (void)library;
}

}  // namespace partune
