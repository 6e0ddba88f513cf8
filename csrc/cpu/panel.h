// Rows of some queries as a panel, a number for each dimension and lane, and back; for varlen_attention.cpp and
// varlen_decode_order.cpp. Rows are transposed four by four.
#pragma once
#include "tiles.h"

namespace {

// Four numbers of a row, whatever W is.
typedef float four __attribute__((vector_size(16)));
typedef uint32_t four_words __attribute__((vector_size(16)));
typedef uint16_t four_halves __attribute__((vector_size(8)));

INLINE four load_four(const float* p) {
  four v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE four load_four(const bf16* p) {
  four_halves v;
  memcpy(&v, p, sizeof v);
  return (four)(__builtin_convertvector(v, four_words) << 16);
}
INLINE void store_four(float* p, four v) { memcpy(p, &v, sizeof v); }
INLINE void store_four(bf16* p, four v) {  // rounded as round_to_bf16 does
  const four_words bits = (four_words)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const four_halves halves = __builtin_convertvector((v != v) ? (bits >> 16) | 0x40u : rounded, four_halves);
  memcpy(p, &halves, sizeof halves);
}

template <class T>
INLINE void copy_row(const T* from, int64_t d, float* to) {
  int64_t c = 0;
  for (; c + 4 <= d; c += 4) store_four(to + c, load_four(from + c));
  for (; c < d; ++c) to[c] = to_float(from[c]);
}

// One vector of a panel from `count` rows: panel[c * stride + lane] = factor * from[lane][c]; the other lanes are 0.
template <class T>
INLINE void rows_to_panel(const T* from, int64_t row_stride, int count, int64_t d, float factor, float* panel,
                          int64_t stride) {
  for (int i = 0; i < W; i += 4) {
    int64_t c = 0;
    for (; c + 4 <= d; c += 4) {
      four x[4];
      for (int j = 0; j < 4; ++j) x[j] = i + j < count ? load_four(from + (i + j) * row_stride + c) * factor : four{};
      transpose(x);
      for (int j = 0; j < 4; ++j) store_four(panel + (c + j) * stride + i, x[j]);
    }
    for (; c < d; ++c)
      for (int j = 0; j < 4; ++j)
        panel[c * stride + i + j] = i + j < count ? to_float(from[(i + j) * row_stride + c]) * factor : 0.f;
  }
}

// The other way: to[lane][c] = factor * panel[c * stride + lane] for the first `count` lanes.
template <class T>
INLINE void panel_to_rows(const float* panel, int64_t stride, float factor, int count, int64_t d, T* to,
                          int64_t row_stride) {
  for (int i = 0; i < count; i += 4) {
    int64_t c = 0;
    for (; c + 4 <= d; c += 4) {
      four x[4];
      for (int j = 0; j < 4; ++j) x[j] = load_four(panel + (c + j) * stride + i) * factor;
      transpose(x);
      for (int j = 0; j < 4 && i + j < count; ++j) store_four(to + (i + j) * row_stride + c, x[j]);
    }
    for (; c < d; ++c)
      for (int j = 0; j < 4 && i + j < count; ++j)
        store_partial(to + (i + j) * row_stride + c, splat(panel[c * stride + i + j] * factor), 1);
  }
}

}  // namespace
