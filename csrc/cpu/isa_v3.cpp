// AVX2 and FMA.
#if defined(__x86_64__)
#include <stdint.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#define ASYMKV_ISA isa_v3
#define ASYMKV_ISA_NAME "x86-64-v3"
#define ASYMKV_LANES 8
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
