// Picks the kernels that this machine runs fastest.
#include <cstdlib>
#include <string>

#include "../checks.h"
#include "kernels.h"

namespace asymkv {

namespace isa_default {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace isa_v3 {
extern const Kernels kernels;
}
namespace isa_v4 {
extern const Kernels kernels;
}
#endif

static const Kernels& choose() {
  const char* asked = std::getenv("ASYMKV_CPU_ISA");
  const std::string wanted = asked ? asked : "v4";
  ASYMKV_CHECK(wanted == "default" || wanted == "v3" || wanted == "v4", "ASYMKV_CPU_ISA must be default, v3 or v4; "
                  "found ", wanted);
#if defined(__x86_64__)
  if (wanted == "v4" && __builtin_cpu_supports("x86-64-v4")) return isa_v4::kernels;
  if (wanted != "default" && __builtin_cpu_supports("x86-64-v3")) return isa_v3::kernels;
#endif
  return isa_default::kernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace asymkv
