// From lists of tensors to matrices and their entries: what the CPU and the CUDA binding of family
// csr_entries share.
#pragma once
#include <vector>

#include "../kernels/csr_entries.h"
#include "checks.h"

namespace partune {

inline CsrEntryTypes csr_entry_types(const char* op, const Tensor& matrix, const Tensor& values) {
  const ScalarType dtype = matrix.scalar_type();
  check_dtype(op, "matrices", matrix,
              {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  if (values.scalar_type() == dtype) {
    return dtype == ScalarType::Double ? kBits64 : dtype == ScalarType::Float ? kBits32 : kBits16;
  }
  check_dtype(op, "values", values, {ScalarType::Float});
  STD_TORCH_CHECK(dtype != ScalarType::Double, op, ": values of float64 matrices must be float64");
  return dtype == ScalarType::BFloat16 ? kBFloat16AsFloat32 : kHalfAsFloat32;
}

struct CsrEntriesList {
  std::vector<MatrixEntries> matrices;
  std::vector<CsrEntryTypes> types;
};

enum class WrittenEntries { kMatrices, kValues };

// What isn't written is only read, though its pointer could write.
inline CsrEntriesList pack_entries(const char* op, WrittenEntries written, const TensorList& matrices,
                                   const TensorList& values, const TensorList& crow_indices,
                                   const TensorList& col_indices) {
  check_lengths(op, matrices.size(), {values.size(), crow_indices.size(), col_indices.size()});
  CsrEntriesList list;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor &matrix = matrices[i], &value = values[i];
    list.types.push_back(csr_entry_types(op, matrix, value));
    STD_TORCH_CHECK(matrix.device() == matrices[0].device(), op, ": all matrices must be on one device");
    STD_TORCH_CHECK(matrix.dim() == 2, op, ": matrices must have two dimensions");
    const int64_t rows = matrix.size(0), nnz = col_indices[i].numel();
    check_vector(op, "crow_indices", crow_indices[i], matrix, {ScalarType::Long}, rows + 1);
    check_vector(op, "col_indices", col_indices[i], matrix, {ScalarType::Int}, nnz);
    check_vector(op, "values", value, matrix, {value.scalar_type()}, nnz);
    const bool into_matrix = written == WrittenEntries::kMatrices;
    list.matrices.push_back(
        {into_matrix ? matrix.mutable_data_ptr() : const_cast<void*>(matrix.const_data_ptr()),
         into_matrix ? const_cast<void*>(value.const_data_ptr()) : value.mutable_data_ptr(),
         crow_indices[i].const_data_ptr<int64_t>(), col_indices[i].const_data_ptr<int32_t>(), rows, nnz,
         matrix.stride(0), matrix.stride(1)});
  }
  return list;
}

}  // namespace partune
