// The CPU bodies of family csr_entries, as a table: one is built per ISA.
#pragma once
#include "csr_entries.h"

namespace partune {

struct CsrEntriesCpu {
  // Entries [begin, end) of one matrix, from it into the values and from them into it.
  void (*gather[kCsrEntryTypesCount])(const MatrixEntries&, int64_t begin, int64_t end);
  void (*scatter[kCsrEntryTypesCount])(const MatrixEntries&, int64_t begin, int64_t end);
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
