// The ops' CUDA bindings, registered for CPU tensors under another name: torch.ops.partune_emulated.
#include "../../csrc/cuda/bindings.h"
#include "../../csrc/schema.h"

STABLE_TORCH_LIBRARY(partune_emulated, library) {
  for (int i = 0; i < partune::kSchemaCount; ++i) library.def(partune::kSchemas[i].text);
}

STABLE_TORCH_LIBRARY_IMPL(partune_emulated, CPU, library) { partune::implement_cuda_ops(library); }
