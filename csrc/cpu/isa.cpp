#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace partune {
namespace {

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

bool machine_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::kBaseline;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

Isa best_isa() {
  Isa best = Isa::kBaseline;
  for (Isa isa : kAll) {
    if (machine_has(isa)) best = isa;
  }
  return best;
}

Isa isa_from_name(const char* name) {
  for (Isa isa : kAll) {
    if (std::string(isa_name(isa)) != name) continue;
    if (machine_has(isa)) return isa;
    throw std::runtime_error(std::string("PARTUNE_CPU_ISA=") + name + ", but this machine's best is " +
                             isa_name(best_isa()));
  }
  throw std::runtime_error(
      std::string("PARTUNE_CPU_ISA must be baseline, avx2, avx512 or avx512_bf16, got '") + name + "'");
}

Isa cpu_isa() {
  static const Isa chosen = [] {
    const char* name = std::getenv("PARTUNE_CPU_ISA");
    return name && *name ? isa_from_name(name) : best_isa();
  }();
  return chosen;
}

bool cpu_is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace partune
