// The activations of feed-forward layers, in float32; csrc/cpu/activation.h has the same.
#pragma once
#include "launch.cuh"

namespace {

__device__ __forceinline__ float silu(float x) { return x / (expf(-x) + 1.f); }

// erfc(a) e^(a^2) for a >= 0: t p(t), t = 1 / (1 + 0.4 a), p fitted for 0 <= a <= 9.5 within 6e-8 of the value.
__device__ __forceinline__ float scaled_erfc(float a) {
  const float t = __fdividef(1.f, a * 0.4f + 1.f);
  float p = 0.040267765522003174f;
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

// x Phi(x), 0 below -13. The square in e^(-x^2 / 2) is taken in two parts, so that the far left is as near as the rest:
// the high 12 bits of x have an exact square.
__device__ __forceinline__ float gelu(float x) {
  const float a = fminf(fabsf(x), 13.2f), high = __uint_as_float(__float_as_uint(a) & ~0xfffu);
  const float rest = (high - a) * (high + a) * 0.5f;  // -(a^2 - high^2) / 2, at most 0.05 in magnitude
  const float correction = ((rest * 0.16666667f + 0.5f) * rest + 1.f) * rest + 1.f;
  const float tail = expf(high * high * -0.5f) * correction * scaled_erfc(a * 0.70710678f) * 0.5f;
  const float y = x * (x < 0.f ? tail : 1.f - tail);
  return x < -13.f ? 0.f : y;
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, which is x / (1 + e^(-2 of that)).
__device__ __forceinline__ float gelu_tanh(float x) {
  const float inner = x * (x * x * 0.044715f + 1.f) * -1.5957691216f;
  return x / (expf(inner) + 1.f);
}

}  // namespace
