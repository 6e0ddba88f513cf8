// The activations of feed-forward layers, for a vector of numbers (csrc/cpu) or one (csrc/cuda).
#pragma once
#include "dialect.h"

namespace {

// x / (1 + e^-x), within 3 ulp.
template <class F>
INLINE F silu(F x) {
  return x / (exp(-x) + 1.f);
}

template <class F>
struct SwigluGrads {
  F gate, up;
};

// The gradients of silu(gate) * up, given that of the product. With s = 1 / (1 + e^-x), silu' = s (1 + x (1 - s)), and
// 1 - s = s e^-x, whose exponent is bounded so that it does not become 0 times infinity.
template <class F>
INLINE SwigluGrads<F> swiglu_grads(F grad, F gate, F up) {
  const F e = exp(min(-gate, splat<F>(88.f)));
  const F s = 1.f / (e + 1.f);
  return {grad * up * (s * (gate * (e * s) + 1.f)), grad * (gate * s)};
}

// erfc(a) e^(a^2) for a >= 0: t p(t), t = 1 / (1 + 0.4 a), p fitted for 0 <= a <= 9.5 within 6e-8 of the value.
template <class F>
INLINE F scaled_erfc(F a) {
  const F t = reciprocal(a * 0.4f + 1.f);
  F p = splat<F>(0.040267765522003174f);
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

// x Phi(x), Phi the normal distribution function, within 8 ulp of itself on both sides; 0 below -13. The square in
// e^(-x^2 / 2) has two parts, for accuracy on the far left: the high 12 bits of x, whose square is exact, and the rest.
template <class F>
INLINE F gelu_erf(F x) {
  const F a = min(abs(x), splat<F>(13.2f));
  const F high = clear_low_bits(a, 0xfff);
  const F rest = (high - a) * (high + a) * 0.5f;  // -(a^2 - high^2) / 2, at most 0.05 in magnitude
  const F correction = ((rest * 0.16666667f + 0.5f) * rest + 1.f) * rest + 1.f;
  const F tail = exp(high * high * -0.5f) * correction * scaled_erfc(a * 0.70710678f) * 0.5f;
  const F y = x * select(x < splat<F>(0.f), tail, 1.f - tail);
  return select(x < splat<F>(-13.f), splat<F>(0.f), y);
}

// The derivative of gelu_erf, Phi(x) + x phi(x), phi the density; beyond 13.2 it is 0 or 1. The square in e^(-x^2 / 2)
// has two parts, as there.
template <class F>
INLINE F gelu_erf_derivative(F x) {
  const F v = clamp(x, splat<F>(-13.2f), splat<F>(13.2f)), a = abs(v);
  const F high = clear_low_bits(a, 0xfff);
  const F rest = (high - a) * (high + a) * 0.5f;
  const F correction = ((rest * 0.16666667f + 0.5f) * rest + 1.f) * rest + 1.f;
  const F e = exp(high * high * -0.5f) * correction;
  const F tail = e * scaled_erfc(a * 0.70710678f) * 0.5f;
  const F y = select(v < splat<F>(0.f), tail, 1.f - tail) + v * 0.39894228f * e;
  return select(x < splat<F>(-13.2f), splat<F>(0.f), y);
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 = x / (1 + e^(-2 sqrt(2 / pi) (x + 0.044715 x^3))). On the left the
// exponent's rounding shows: 2 ulp for x > -0.5, 60 at -6.
template <class F>
INLINE F gelu_tanh(F x) {
  const F exponent = x * (x * x * 0.044715f + 1.f) * -1.5957691216f;
  return x / (exp(exponent) + 1.f);
}

// The derivative of gelu_tanh, s + x s (1 - s) u' with s = 1 / (1 + e^-u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3). It is
// 0 or 1 beyond 12. s (1 - s) is computed from e^-|u|, which is at most 1.
template <class F>
INLINE F gelu_tanh_derivative(F x) {
  const F v = clamp(x, splat<F>(-12.f), splat<F>(12.f)), square = v * v;
  const F u = v * (square * 0.044715f + 1.f) * 1.5957691216f;
  const F e = exp(-abs(u)), s = 1.f / (e + 1.f), tail = e * s;
  const F exponent_grad = (square * (3.f * 0.044715f) + 1.f) * 1.5957691216f;
  return select(v < splat<F>(0.f), tail, s) + v * (tail * s) * exponent_grad;
}

}  // namespace
