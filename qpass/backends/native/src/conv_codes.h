// The quick end of a convolution: sixty-four sums to codes without leaving the registers.
//
//     codes = clamp(round(sum * alpha + beta + other * other_scale), low, high)
#pragma once
#include "conv.h"

namespace qpass {

// V vectors of 16 sums -> 16 V codes in the order of the columns
template <int V>
__attribute__((always_inline)) inline __m512i in_order(const __m512i (&q)[4]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packs_epi32(q[0], q[1]), high = V > 2 ? _mm512_packs_epi32(q[2], q[3]) : low;
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

inline __m512i to_codes(__m512 y) { return _mm512_cvtps_epi32(_mm512_min_ps(y, _mm512_set1_ps(1e6f))); }

inline __m512i clamp_codes(const Conv& p, __m512i codes) {
  return _mm512_min_epu8(_mm512_max_epu8(codes, _mm512_set1_epi8(static_cast<char>(p.low))),
                         _mm512_set1_epi8(static_cast<char>(p.high)));
}

}  // namespace qpass
