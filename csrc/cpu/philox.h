// Philox4x32-10 (Salmon et al. 2011), many counters at a time: the keyed noise of kernels/_sampling.py, bit for bit.
//
// Per counter and round, two products of 32 by 32 bits. x86 multiplies the even 32-bit lanes of a register to 64 bits
// and ignores the odd ones, so each counter word gets a 64-bit lane whose upper half may hold anything:
//
//     register of counter word 0:   | quad 0 | any | quad 2 | any | ...      a second register has the odd quads
//
// A round is then 2 multiplies, 2 shifts and 4 xors, without a shuffle. 10 rounds for two registers of counters give 4
// words a counter.
#pragma once
#include "intrinsics.h"
#include "sampling.h"

namespace {

#if defined(__AVX512F__) && (!defined(SIMD_WIDTH) || SIMD_WIDTH >= 16)
#define X86(name) _mm512_##name
typedef __m512i Register;
constexpr int quads_per_call = 16;
#elif defined(__AVX2__) && (!defined(SIMD_WIDTH) || SIMD_WIDTH >= 8)
#define X86(name) _mm256_##name
typedef __m256i Register;
constexpr int quads_per_call = 8;
#elif defined(__SSE2__)
#define X86(name) _mm_##name
typedef __m128i Register;
constexpr int quads_per_call = 4;
#else
constexpr int quads_per_call = 4;
#endif

#if defined(X86)

typedef uint64_t Lanes __attribute__((vector_size(sizeof(Register))));

INLINE Lanes multiply_even(Lanes a, uint32_t b) { return (Lanes)X86(mul_epu32)((Register)a, (Register)(Lanes{} + b)); }

// The 4 * quads_per_call words of the counters quad, quad + 1, ..., in the order of their tokens.
INLINE void philox(const NoiseKey& key, uint32_t quad, uint32_t* words) {
  constexpr int groups = sizeof(Register) / 16;  // 128-bit parts, which the unpacks below stay within
  // Lane 4 h + r of the packed result holds counter groups * r + h, so that a 4x4 transpose within each part
  // leaves the words of consecutive tokens side by side.
  Lanes word[2][4], first[2];
  for (int h = 0; h < groups; ++h)
    for (int r = 0; r < 4; ++r) first[r % 2][2 * h + r / 2] = groups * r + h;
  for (int i = 0; i < 2; ++i) word[i][0] = first[i] + quad;
  for (auto& c : word) {
    c[1] = Lanes{} + key.step;
    c[2] = Lanes{} + key.row_id[0];
    c[3] = Lanes{} + key.row_id[1];
  }
  uint32_t k0 = key.seed[0], k1 = key.seed[1];
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (auto& c : word) {
      const Lanes left = multiply_even(c[0], 0xD2511F53u), right = multiply_even(c[2], 0xCD9E8D57u);
      c[0] = (right >> 32) ^ c[1] ^ k0;
      c[1] = right;
      c[2] = (left >> 32) ^ c[3] ^ k1;
      c[3] = left;
    }
  }
  Register w[4];
  for (int j = 0; j < 4; ++j) w[j] = (Register)((word[0][j] & 0xffffffffu) | (word[1][j] << 32));
  const Register low01 = X86(unpacklo_epi32)(w[0], w[1]), high01 = X86(unpackhi_epi32)(w[0], w[1]);
  const Register low23 = X86(unpacklo_epi32)(w[2], w[3]), high23 = X86(unpackhi_epi32)(w[2], w[3]);
  const Register out[4] = {X86(unpacklo_epi64)(low01, low23), X86(unpackhi_epi64)(low01, low23),
                           X86(unpacklo_epi64)(high01, high23), X86(unpackhi_epi64)(high01, high23)};
  memcpy(words, out, sizeof out);
}

#else

INLINE void philox(const NoiseKey& key, uint32_t quad, uint32_t* words) {
  uint32_t c[4][quads_per_call];
  for (int i = 0; i < quads_per_call; ++i) {
    c[0][i] = quad + i;
    c[1][i] = key.step;
    c[2][i] = key.row_id[0];
    c[3][i] = key.row_id[1];
  }
  uint32_t k0 = key.seed[0], k1 = key.seed[1];
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < quads_per_call; ++i) {
      const uint64_t left = (uint64_t)c[0][i] * 0xD2511F53u, right = (uint64_t)c[2][i] * 0xCD9E8D57u;
      c[0][i] = (uint32_t)(right >> 32) ^ c[1][i] ^ k0;
      c[1][i] = (uint32_t)right;
      c[2][i] = (uint32_t)(left >> 32) ^ c[3][i] ^ k1;
      c[3][i] = (uint32_t)left;
    }
  }
  for (int i = 0; i < quads_per_call; ++i)
    for (int j = 0; j < 4; ++j) words[4 * i + j] = c[j][i];
}

#endif
#undef X86

}  // namespace
