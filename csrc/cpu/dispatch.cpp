#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace osf {

namespace generic {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

const Kernels* choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool with_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool with_avx512 = with_avx2 && __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool with_bf16 = with_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  const Candidate fastest_first[] = {
#if defined(__x86_64__)
      {&avx512_bf16::kernels, with_bf16},
      {&avx512::kernels, with_avx512},
      {&avx2::kernels, with_avx2},
#endif
      {&generic::kernels, true}};
  const char* wanted = std::getenv("OSF_CPU");
  std::string available;
  for (const auto& [kernels, supported] : fastest_first) {
    if (!supported) continue;
    if (!wanted || std::string(wanted) == kernels->isa) return kernels;
    available += std::string(" ") + kernels->isa;
  }
  throw std::runtime_error(std::string("OSF_CPU=") + wanted + ", but this CPU has" + available);
}

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels* const kernels = choose();
  return *kernels;
}

}  // namespace osf
