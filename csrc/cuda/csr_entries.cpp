// Family csr_entries on CUDA: checks, packing, launches. Nothing is read back from the device.
#include "../binding/csr_entries.h"

#include "bindings.h"
#include "device.h"
#include "launchers.h"

namespace partune {
namespace {

// launch(types, matrices, count, stream) for each combination of dtypes, matrices without entries left out.
template <typename Launch>
void launch_list(const char* op, const CsrEntriesList& list, const TensorList& tensors,
                 const Launch& launch) {
  if (tensors.empty()) return;
  const int device = tensors[0].get_device_index();
  const DeviceScope scope(device);
  const cudaStream_t stream = current_stream(device);
  for (int types = 0; types < kCsrEntryTypesCount; ++types) {
    std::vector<MatrixEntries> matrices;
    for (size_t i = 0; i < list.matrices.size(); ++i) {
      if (list.types[i] == types && list.matrices[i].nnz > 0) matrices.push_back(list.matrices[i]);
    }
    check_launch(op, launch(CsrEntryTypes(types), matrices.data(), int(matrices.size()), stream));
  }
}

}  // namespace

void gather_csr_cuda_(TensorList values, TensorList matrices, TensorList crow_indices,
                      TensorList col_indices) {
  const char* op = "gather_csr_";
  launch_list(op, pack_entries(op, WrittenEntries::kValues, matrices, values, crow_indices, col_indices),
              matrices, launch_gather_csr);
}

void scatter_csr_cuda_(TensorList matrices, TensorList values, TensorList crow_indices,
                       TensorList col_indices) {
  const char* op = "scatter_csr_";
  launch_list(op, pack_entries(op, WrittenEntries::kMatrices, matrices, values, crow_indices, col_indices),
              matrices, launch_scatter_csr);
}

}  // namespace partune
