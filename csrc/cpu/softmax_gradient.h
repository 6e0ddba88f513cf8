// The gradient of a loss of a row's log p, entropy and KL by its raw logits; softmax.h has the mathematics.
#pragma once
#include "softmax.h"

namespace {

// The gradient by z is `target` for the target, p (a + b log p + c (log p_ref - log p)) for the others;
// kernels/_head.py defines it. Of the others p is scale e^(z-m). The chain rule carries it to the raw logits x.
struct LogitGrad {
  double max, scale, log_scale, a, b, target;
  double c, ref_max, ref_log_scale;
};

enum class Loss { LOGPROB, ENTROPY, KL };  // each with those before it

template <bool SOFTCAP, Loss LOSS>
struct RowGradient {
  const Scaling& scaling;
  f32 origin, ref_origin;
  float factor, log_scale, a, b, c, ref_log_scale, unit, z_grad;
  double rounding;  // of the factor; the target's gradient has it too, so that the row sums to 0

  RowGradient(const LogitGrad& grad, const Scaling& scaling) : scaling(scaling) {
    const double by_logit = min(1. / scaling.temperature, 3e38);
    origin = splat(position<SOFTCAP>((float)grad.max, scaling));
    ref_origin = splat(LOSS == Loss::KL ? position<SOFTCAP>((float)grad.ref_max, scaling) : 0.f);
    const double exact_factor = LOSS == Loss::LOGPROB ? grad.scale * grad.a * by_logit : grad.scale;
    factor = (float)exact_factor;
    rounding = LOSS == Loss::LOGPROB && __builtin_fabs(exact_factor) >= FLT_MIN ? factor / exact_factor : 1.;
    log_scale = (float)grad.log_scale;
    a = (float)grad.a;
    b = (float)grad.b;
    c = (float)grad.c;
    ref_log_scale = (float)grad.ref_log_scale;
    unit = (float)scaling.unit;
    z_grad = (float)by_logit;
  }

  INLINE f32 operator()(f32 x, f32 ref) const {
    const f32 at = position<SOFTCAP>(x, scaling), lowest = splat(scaling.lowest);
    const f32 raw_distance = at - origin, distance = max(lowest, raw_distance);
    const i32 vanishes = raw_distance < lowest;                                      // of a NaN p is NaN
    f32 y = select(vanishes, splat(0.f), exp_distance(distance, scaling)) * factor;  // NaN where the factor is
    if (LOSS != Loss::LOGPROB) {
      const f32 logp = distance * unit + log_scale;
      f32 inner = a + b * logp;
      if (LOSS == Loss::KL) {
        inner = inner + c * (((position<SOFTCAP>(ref, scaling) - ref_origin) * unit + ref_log_scale) - logp);
        inner = select(vanishes, splat(0.f), inner);
      }
      y = y * inner * z_grad;
    }
    return SOFTCAP ? y * (1.f - at * at) : y;
  }
};

// out may be x.
template <bool SOFTCAP, Loss LOSS, class T, class Out>
INLINE void row_gradient(const T* x, const float* bias, const float* ref, const float* ref_bias, Out* out,
                         int64_t columns, int64_t target, const LogitGrad& grad, const Scaling& scaling) {
  const bool has_target = target >= 0 && target < columns;
  const RowGradient<SOFTCAP, LOSS> gradient(grad, scaling);
  const float target_logit = has_target ? to_float(x[target]) + (bias ? bias[target] : 0.f) : 0.f;
  const auto at = [&](int64_t i, int n) {
    const f32 logits = load_logits(x + i, bias ? bias + i : nullptr, n);
    return gradient(logits, LOSS == Loss::KL ? load_logits(ref + i, ref_bias ? ref_bias + i : nullptr, n) : logits);
  };
  int64_t i = 0;
  for (; i + W <= columns; i += W) store(out + i, at(i, W));
  if (i < columns) store_partial(out + i, at(i, (int)(columns - i)), (int)(columns - i));
  if (has_target) {
    const double target_grad = grad.target * gradient.rounding * scaling.z_grad(target_logit);
    store_partial(out + target, splat((float)target_grad), 1);
  }
}

template <bool SOFTCAP, class T, class Out>
INLINE void row_gradient(const T* x, const float* bias, Out* out, int64_t columns, int64_t target,
                         const LogitGrad& grad, const Scaling& scaling) {
  if (grad.b == 0)
    row_gradient<SOFTCAP, Loss::LOGPROB>(x, bias, nullptr, nullptr, out, columns, target, grad, scaling);
  else
    row_gradient<SOFTCAP, Loss::ENTROPY>(x, bias, nullptr, nullptr, out, columns, target, grad, scaling);
}

}  // namespace
