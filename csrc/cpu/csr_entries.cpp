// Family csr_entries on the CPU: checks, and the entries of all matrices divided among threads.
#include "../binding/csr_entries.h"

#include <torch/csrc/stable/library.h>

#include "../kernels/csr_entries_cpu.h"
#include "for_entries.h"
#include "isa.h"

namespace partune {
namespace {

// bodies[types](matrix, begin, end) over all entries of a list.
void run_entries(const CsrEntriesList& list, const CsrEntriesBodies& bodies) {
  for_entries(list.matrices, [&](size_t i, int64_t begin, int64_t end) {
    bodies[list.types[i]](list.matrices[i], begin, end);
  });
}

void check_on_cpu(const char* op, const TensorList& matrices) {
  for (const Tensor& one : matrices) STD_TORCH_CHECK(one.is_cpu(), op, ": matrices must be on the CPU");
}

void gather_csr_(TensorList values, TensorList matrices, TensorList crow_indices, TensorList col_indices) {
  const char* op = "gather_csr_";
  check_on_cpu(op, matrices);
  run_entries(pack_entries(op, WrittenEntries::kValues, matrices, values, crow_indices, col_indices),
              PARTUNE_CPU_TABLE(csr_entries_cpu).gather);
}

void scatter_csr_(TensorList matrices, TensorList values, TensorList crow_indices, TensorList col_indices) {
  const char* op = "scatter_csr_";
  check_on_cpu(op, matrices);
  run_entries(pack_entries(op, WrittenEntries::kMatrices, matrices, values, crow_indices, col_indices),
              PARTUNE_CPU_TABLE(csr_entries_cpu).scatter);
}

}  // namespace
}  // namespace partune

STABLE_TORCH_LIBRARY_IMPL(partune, CPU, library) {
  library.impl("gather_csr_", TORCH_BOX(&partune::gather_csr_));
  library.impl("scatter_csr_", TORCH_BOX(&partune::scatter_csr_));
}
