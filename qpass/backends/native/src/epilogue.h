// What follows an integer product of channels-last rows, done before the row is stored.
//
//     y = act((sum * alpha[n]) * sample_scale + beta[n] + other)        sums already hold - zero point * offset
//
// stored as f32, bf16 or u8 = clamp(round(y / scale) + zero, 0, max). Where the activation only clamps and codes are written, alpha and
// beta already hold 1 / scale and the zero point, and y is a code: one multiply-add, one clamp.
#pragma once
#include "simd.h"

namespace qpass {

enum Type { F32 = 0, BF16 = 1, U8 = 2 };
enum ConvActivation { CONV_NONE, CONV_RELU, CONV_GELU, CONV_GELU_TANH, CONV_SILU, CONV_RELU6, CONV_HARDSWISH, CONV_HARDSIGMOID, CONV_SIGMOID, CONV_PRELU, CONV_CAP };

struct Epilogue {
  const float *alpha, *beta, *slope;
  const void* other;
  void* out;
  int64_t ld;  // elements of a row of out and other
  int32_t act, out_type, other_type, direct;  // direct: 2 where no sum times its factor leaves int32
  float other_scale, other_zero;  // of u8 others; where direct, other_scale holds 1 / scale too
  float low, high;                // the clamp of direct codes; where slope is given it holds the upper bounds
  float out_inverse, out_zero, out_max;
};

inline __m512 load_other(const Epilogue& p, int64_t at, __mmask16 mask) {
  if (p.other_type == U8) {
    const __m512i q = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(p.other) + at));
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(p.other_zero)), _mm512_set1_ps(p.other_scale));
  }
  __m512 y;
  if (p.other_type == BF16)
    y = from_bf16(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p.other) + at));
  else
    y = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p.other) + at);
  return p.direct ? _mm512_mul_ps(y, _mm512_set1_ps(p.other_scale)) : y;
}

inline __m512 conv_activate(int act, __m512 y, __m512 slope) {
  const __m512 zero = _mm512_setzero_ps(), six = _mm512_set1_ps(6.0f);
  switch (act) {
    case CONV_RELU: return _mm512_max_ps(y, zero);
    case CONV_GELU: return activate<GELU>(y);
    case CONV_GELU_TANH: return activate<GELU_TANH>(y);
    case CONV_SILU: return activate<SILU>(y);
    case CONV_RELU6: return _mm512_min_ps(_mm512_max_ps(y, zero), six);
    case CONV_HARDSIGMOID:
    case CONV_HARDSWISH: {
      const __m512 third = _mm512_fmadd_ps(y, _mm512_set1_ps(1.0f / 6), _mm512_set1_ps(0.5f));
      const __m512 gate = _mm512_min_ps(_mm512_max_ps(third, zero), _mm512_set1_ps(1.0f));
      return act == CONV_HARDSWISH ? _mm512_mul_ps(y, gate) : gate;
    }
    case CONV_SIGMOID: return sigmoid(y);
    case CONV_CAP: return _mm512_min_ps(_mm512_max_ps(y, zero), slope);
    case CONV_PRELU: return _mm512_mask_mul_ps(y, _mm512_cmp_ps_mask(y, zero, _CMP_LT_OQ), y, slope);
    default: return y;
  }
}

inline void store_codes(uint8_t* out, __mmask16 mask, __m512 y, float low, __m512 high) {
  y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(low)), high);
  _mm_mask_storeu_epi8(out, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(y)));
}

// sixteen sums of channels n .. n + 15 of the pixel that is row `row` of the output
inline void finish_lanes(const Epilogue& p, __m512i sum, int64_t row, int64_t n, __mmask16 mask, __m512 alpha, __m512 beta, float sample) {
  const int64_t at = row * p.ld + n;
  __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), alpha);
  y = _mm512_fmadd_ps(y, _mm512_set1_ps(sample), beta);
  if (p.other) y = _mm512_add_ps(y, load_other(p, at, mask));
  const __m512 slope = p.slope ? _mm512_maskz_loadu_ps(mask, p.slope + n) : _mm512_set1_ps(p.high);
  if (p.direct) return store_codes(static_cast<uint8_t*>(p.out) + at, mask, y, p.low, slope);
  y = conv_activate(p.act, y, slope);
  if (p.out_type == F32) return _mm512_mask_storeu_ps(static_cast<float*>(p.out) + at, mask, y);
  if (p.out_type == BF16) return _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.out) + at, mask, to_bf16(y));
  const __m512 code = _mm512_add_ps(_mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(p.out_inverse)), 8), _mm512_set1_ps(p.out_zero));
  store_codes(static_cast<uint8_t*>(p.out) + at, mask, code, 0.0f, _mm512_set1_ps(p.out_max));
}

// the order that undoes what packing does to dwords
inline __m512i packed_order() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }

// What direct codes of 64 channels n .. n + 63 take, in the order of channels; read once for all pixels of a task. Sums of
// these have an image in common, and so its scale `sample`.
//
// Codes are clamped when they are bytes, which is the same: rounding is monotone, packing saturates, and a Conv that is called `quick` has
// no sum that an int32 cannot hold after the factor.
struct Panel {
  __m512 alpha[4], beta[4];
  __m512i low, high;  // bytes
  __mmask64 mask;     // the channels that are there
  int64_t n;
};

inline __m512i bytes_of(const __m512 (&y)[4]) {
  const __m512i order = packed_order();
  const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(y[0]), _mm512_cvtps_epi32(y[1]));
  const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(y[2]), _mm512_cvtps_epi32(y[3]));
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

inline Panel panel_of(const Epilogue& p, int64_t n, int64_t end, float sample) {
  Panel panel;
  panel.n = n;
  panel.mask = end - n >= 64 ? ~0ull : (1ull << (end - n)) - 1;
  panel.low = _mm512_set1_epi8(static_cast<char>(p.low));
  const __m512 shift = _mm512_set1_ps(p.other && p.other_type == U8 ? p.other_zero * p.other_scale : 0.0f);
  __m512 high[4];
  for (int v = 0; v < 4; v++) {
    const __mmask16 some = static_cast<__mmask16>(panel.mask >> 16 * v);
    panel.alpha[v] = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, p.alpha + n + 16 * v), _mm512_set1_ps(sample));
    panel.beta[v] = _mm512_sub_ps(_mm512_maskz_loadu_ps(some, p.beta + n + 16 * v), shift);
    high[v] = p.slope ? _mm512_maskz_loadu_ps(some, p.slope + n + 16 * v) : _mm512_set1_ps(p.high);
  }
  panel.high = bytes_of(high);
  return panel;
}

enum Ending { CODES, ADD_CODES, ADD_HALVES, HALVES, FLOATS };  // codes, with codes or bfloat16 added; bfloat16 and float32, with the same added

// values that an activation only clamps
template <int HOW, int V>
__attribute__((always_inline)) inline void finish_values(const Epilogue& p, const Panel& panel, int64_t row, const __m512i (&sum)[V]) {
  const int64_t at = row * p.ld + panel.n;
  const __m512 low = _mm512_set1_ps(p.act == CONV_NONE ? -INFINITY : 0.0f), high = _mm512_set1_ps(p.act == CONV_RELU6 ? 6.0f : INFINITY);
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const __mmask16 some = static_cast<__mmask16>(panel.mask >> 16 * v);
    __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[v]), panel.alpha[v], panel.beta[v]);
    if (HOW == HALVES) {
      if (p.other) y = _mm512_add_ps(y, from_bf16(_mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(p.other) + at + 16 * v)));
      y = _mm512_min_ps(_mm512_max_ps(y, low), high);
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.out) + at + 16 * v, some, to_bf16(y));
    } else {
      if (p.other) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(some, static_cast<const float*>(p.other) + at + 16 * v));
      y = _mm512_min_ps(_mm512_max_ps(y, low), high);
      _mm512_mask_storeu_ps(static_cast<float*>(p.out) + at + 16 * v, some, y);
    }
  }
}

// V vectors of sums of one pixel, written at once
template <int HOW, int V>
__attribute__((always_inline)) inline void finish_pixel(const Epilogue& p, const Panel& panel, int64_t row, const __m512i (&sum)[V]) {
  if (HOW == HALVES || HOW == FLOATS) return finish_values<HOW, V>(p, panel, row, sum);
  const int64_t at = row * p.ld + panel.n;
  const bool whole = V == 4 && panel.mask == ~0ull;
  __m512i code[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[v]), panel.alpha[v], panel.beta[v]);
    const __mmask16 some = static_cast<__mmask16>(panel.mask >> 16 * v);
    if (HOW == ADD_CODES) {
      const uint8_t* other = static_cast<const uint8_t*>(p.other) + at + 16 * v;
      const __m128i bytes = whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(other)) : _mm_maskz_loadu_epi8(some, other);
      y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), _mm512_set1_ps(p.other_scale), y);
    }
    if (HOW == ADD_HALVES) {
      const uint16_t* other = static_cast<const uint16_t*>(p.other) + at + 16 * v;
      y = _mm512_fmadd_ps(from_bf16(_mm256_maskz_loadu_epi16(some, other)), _mm512_set1_ps(p.other_scale), y);
      y = _mm512_min_ps(y, _mm512_set1_ps(65535.0f));  // what is added may be of any size; int32 would turn it negative
    }
    code[v] = _mm512_cvtps_epi32(y);
  }
  uint8_t* out = static_cast<uint8_t*>(p.out) + at;
  if (V == 1) {
    const __m128i packed = _mm512_cvtusepi32_epi8(_mm512_max_epi32(code[0], _mm512_setzero_si512()));
    const __m128i clamped = _mm_max_epu8(_mm_min_epu8(packed, _mm512_castsi512_si128(panel.high)), _mm512_castsi512_si128(panel.low));
    if (static_cast<__mmask16>(panel.mask) == 0xFFFF)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), clamped);
    else
      _mm_mask_storeu_epi8(out, static_cast<__mmask16>(panel.mask), clamped);
    return;
  }
  const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
  const __m512i clamped = _mm512_max_epu8(_mm512_min_epu8(_mm512_permutexvar_epi32(packed_order(), packed), panel.high), panel.low);
  if (whole)
    _mm512_storeu_si512(out, clamped);
  else if (V == 2 && panel.mask == 0xFFFFFFFF)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(clamped));
  else
    _mm512_mask_storeu_epi8(out, panel.mask, clamped);
}

}  // namespace qpass
