// Launchers of family csr_entries: grid arithmetic, raw pointers and a stream.
#pragma once
#include "../kernels/csr_entries.cuh"
#include "fill_batch.cuh"

namespace partune {

inline int64_t stepped_entries(const MatrixEntries& matrix) { return matrix.nnz; }

template <typename Kernel>
cudaError_t launch_csr_entries(Kernel kernel, const MatrixEntries* matrices, int count, cudaStream_t stream) {
  CsrEntriesBatch batch;
  for (int done = 0; done < count;) {
    const unsigned blocks = fill_batch(matrices, count, done, batch);
    if (blocks == 0) return cudaErrorInvalidConfiguration;
    const cudaError_t error = LAUNCH(kernel, dim3(blocks), dim3(kEntryBlock), 0, stream, batch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// The types of a matrix and its values that a launch is built for.
template <typename StoredType, typename ValueType>
struct EntryTypes {
  using Stored = StoredType;
  using Value = ValueType;
};

template <typename Launch>
cudaError_t with_entry_types(CsrEntryTypes types, const Launch& launch) {
  switch (types) {
    case kBits16:
      return launch(EntryTypes<uint16_t, uint16_t>());
    case kBits32:
      return launch(EntryTypes<uint32_t, uint32_t>());
    case kBits64:
      return launch(EntryTypes<uint64_t, uint64_t>());
    case kBFloat16AsFloat32:
      return launch(EntryTypes<BFloat16, float>());
    case kHalfAsFloat32:
      return launch(EntryTypes<Half, float>());
    case kCsrEntryTypesCount:
      break;
  }
  return cudaErrorNotSupported;
}

}  // namespace partune
