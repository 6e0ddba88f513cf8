// The compiler's intrinsics, where the processor is an x86.
#pragma once
#if defined(__SSE2__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc's own header, its PR 105593
#endif
#include <immintrin.h>
#endif
