// The CPU bodies of family csr_entries, as a table: one is built per ISA.
#pragma once
#include "csr_entries.h"

namespace partune {

// Entries [begin, end) of one matrix, by types.
typedef void (*CsrEntriesBodies[kCsrEntryTypesCount])(const MatrixEntries&, int64_t begin, int64_t end);

struct CsrEntriesCpu {
  CsrEntriesBodies gather, scatter;  // from the matrix into the values, and from them into it
};

namespace baseline {
extern const CsrEntriesCpu csr_entries_cpu;
}
namespace avx2 {
extern const CsrEntriesCpu csr_entries_cpu;
}
namespace avx512 {
extern const CsrEntriesCpu csr_entries_cpu;
}
namespace avx512_bf16 {  // nothing in it for these bodies
using avx512::csr_entries_cpu;
}

}  // namespace partune
