// The activations of feed-forward layers, on vectors.
#pragma once
#include "simd.h"

namespace {

// x / (1 + e^-x), within 3 ulp.
INLINE f32 silu(f32 x) { return x / (exp(-x) + 1.f); }

// erfc(a) e^(a^2) for a >= 0: t p(t), t = 1 / (1 + 0.4 a), p fitted for 0 <= a <= 9.5 within 6e-8 of the value.
INLINE f32 scaled_erfc(f32 a) {
  const f32 t = 1.f / (a * 0.4f + 1.f);
  f32 p = splat(0.040267765522003174f);
  p = p * t - 0.1354723870754242f;
  p = p * t + 0.0738447904586792f;
  p = p * t + 0.0997265949845314f;
  p = p * t + 0.07151034474372864f;
  p = p * t + 0.1969621777534485f;
  p = p * t + 0.20095880329608917f;
  p = p * t + 0.22657568752765656f;
  p = p * t + 0.22562630474567413f;
  return p * t;
}

// x Phi(x), Phi the normal distribution function, within 8 ulp of its own size on either side; 0 below -13. The square
// in e^(-x^2 / 2) is taken in two parts, so that the far left is as near as the rest: the high 12 bits of x have an
// exact square.
INLINE f32 gelu(f32 x) {
  const f32 a = min(abs(x), splat(13.2f)), high = as_float(as_int(a) & ~0xfff);
  const f32 rest = (high - a) * (high + a) * 0.5f;  // -(a^2 - high^2) / 2, at most 0.05 in magnitude
  const f32 correction = ((rest * 0.16666667f + 0.5f) * rest + 1.f) * rest + 1.f;
  const f32 tail = exp(high * high * -0.5f) * correction * scaled_erfc(a * 0.70710678f) * 0.5f;
  const f32 y = x * select(x < splat(0.f), tail, 1.f - tail);
  return select(x < splat(-13.f), splat(0.f), y);
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, which is x / (1 + e^(-2 of that)). The
// exponent's rounding shows on the left: 2 ulp for x > -0.5, 60 at -6.
INLINE f32 gelu_tanh(f32 x) {
  const f32 inner = x * (x * x * 0.044715f + 1.f) * -1.5957691216f;
  return x / (exp(inner) + 1.f);
}

}  // namespace
