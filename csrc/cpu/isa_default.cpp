// Whatever the compiler's target has.
#define ASYMKV_ISA isa_default
#define ASYMKV_ISA_NAME "default"
#define ASYMKV_LANES 8
#include "isa.h"
