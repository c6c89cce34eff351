// Which instruction set the CPU bodies run with: the best that the machine has, or a lower one named
// by PARTUNE_CPU_ISA. Decided once, when the first op needs it.
#pragma once

namespace partune {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

Isa cpu_isa();
const char* isa_name(Isa isa);

// Throws std::runtime_error if the name is unknown or the machine lacks the instruction set.
Isa isa_from_name(const char* name);
Isa best_isa();

bool cpu_is_amd();

}  // namespace partune

// The table of the chosen instruction set: PARTUNE_CPU_TABLE(sparse_adamw_cpu).step[...](...).
#if defined(__x86_64__)
#define PARTUNE_CPU_TABLE(table)                                                       \
  (::partune::cpu_isa() == ::partune::Isa::kAvx512Bf16 ? ::partune::avx512_bf16::table \
   : ::partune::cpu_isa() == ::partune::Isa::kAvx512   ? ::partune::avx512::table      \
   : ::partune::cpu_isa() == ::partune::Isa::kAvx2     ? ::partune::avx2::table        \
                                                       : ::partune::baseline::table)
#else
#define PARTUNE_CPU_TABLE(table) (::partune::baseline::table)
#endif
