// AVX-512.
#if defined(__x86_64__)
#include <stdint.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
#endif
#define ASYMKV_ISA isa_v4
#define ASYMKV_ISA_NAME "x86-64-v4"
#define ASYMKV_LANES 16
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
