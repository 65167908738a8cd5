// Numbers as they lie in memory: f32, bf16 or u8, sixteen at a time as f32.
#pragma once
#include "simd.h"

namespace qpass {

enum Type { F32 = 0, BF16 = 1, U8 = 2 };

inline __m512 load(const void* base, int type, int64_t at, __mmask16 mask) {
  if (type == BF16) return from_bf16(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(base) + at));
  if (type == U8)
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(base) + at)));
  return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(base) + at);
}

// u8: clamp(round(y * inverse) + zero, 0, high)
inline void store(void* out, int type, int64_t at, __mmask16 mask, __m512 y, float inverse, int zero, int high = 255) {
  if (type == F32) return _mm512_mask_storeu_ps(static_cast<float*>(out) + at, mask, y);
  if (type == BF16) return _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, mask, to_bf16(y));
  const __m512 scaled = _mm512_min_ps(_mm512_mul_ps(y, _mm512_set1_ps(inverse)), _mm512_set1_ps(1e6f));
  const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(zero));
  __m128i codes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(q, _mm512_setzero_si512()));
  if (high < 255) codes = _mm_min_epu8(codes, _mm_set1_epi8(static_cast<char>(high)));
  _mm_mask_storeu_epi8(static_cast<uint8_t*>(out) + at, mask, codes);
}

}  // namespace qpass
