// Sixteen floats at a time: the functions that the kernels share. AVX-512 only; see build.py for what is required.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qpass {

inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1); }

// e^x: 2^n * p(r), r in [-ln2/2, ln2/2], p the Taylor polynomial of degree 6 (relative error 2e-7); exact 0 below -87.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  x = _mm512_min_ps(x, _mm512_set1_ps(88.7f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// 2^x, relative error 8e-5 (minimax of degree 3): for results that are stored with 8 bits of mantissa. 0 below -150.
inline __m512 exp2_short(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, 8);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(5.51716703e-2f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.42611125e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93260985e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.99928073e-1f));
  return _mm512_scalef_ps(p, n);
}

// 1 / x to 23 bits: the processor's estimate and one Newton step.
inline __m512 reciprocal(__m512 x) {
  const __m512 y = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.0f)));
}

// erf(x), absolute error 1.5e-7 (Abramowitz and Stegun 7.1.26).
inline __m512 erf(__m512 x) {
  const __m512 a = _mm512_abs_ps(x);
  const __m512 t = reciprocal(_mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  p = _mm512_mul_ps(p, t);
  const __m512 e = exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(a, a)));
  const __m512 y = _mm512_fnmadd_ps(p, e, _mm512_set1_ps(1.0f));
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(y), sign));
}

inline __m512 sigmoid(__m512 x) {
  const __m512 e = exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return reciprocal(_mm512_min_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), e), _mm512_set1_ps(1e37f)));
}

enum Activation {
  NONE = 0, RELU = 1, GELU = 2, GELU_TANH = 3, SILU = 4, GELU_SHORT = 5,
  RELU6 = 6, HARDSWISH = 7, HARDSIGMOID = 8, SIGMOID = 9, PRELU = 10,  // convolutions only; PRELU is done where slopes are known
  SILU_SHORT = 11, SIGMOID_SHORT = 12,
};

// An activation for results that are rounded to steps of 1 / inverse: where these are wide, a shorter one that errs by at most a
// seventh of one (GELU_SHORT) or a twentieth.
inline int short_for_codes(int act, float inverse) {
  constexpr float WIDE_STEP = 2e-3f;
  if (inverse * WIDE_STEP >= 1) return act;
  return act == GELU ? GELU_SHORT : act == SILU ? SILU_SHORT : act == SIGMOID ? SIGMOID_SHORT : act;
}

// relative error 1.5e-4
inline __m512 sigmoid_short(__m512 x) {
  const __m512 e = exp2_short(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
  return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// x Phi(x), absolute error 3e-4: a minimax polynomial for (Phi(x) - 0.5) / x on [-3.8, 3.8], where Phi is taken to be 0 or 1
// from. For results that are rounded to steps much wider than that.
inline __m512 gelu_short(__m512 x) {
  const __m512 edge = _mm512_set1_ps(3.8f);
  const __m512 c = _mm512_max_ps(_mm512_min_ps(x, edge), _mm512_sub_ps(_mm512_setzero_ps(), edge));
  const __m512 t = _mm512_mul_ps(c, c);
  __m512 p = _mm512_set1_ps(1.96293968e-8f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.41556174e-6f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(4.39032083e-5f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-7.70944986e-4f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(8.54672678e-3f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-6.40445873e-2f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(3.97484630e-1f));
  return _mm512_mul_ps(x, _mm512_fmadd_ps(p, c, _mm512_set1_ps(0.5f)));
}

inline __m512 relu6(__m512 x) { return _mm512_min_ps(_mm512_max_ps(x, _mm512_setzero_ps()), _mm512_set1_ps(6.0f)); }

// relu6(x + 3) / 6
inline __m512 hardsigmoid(__m512 x) {
  return _mm512_mul_ps(relu6(_mm512_add_ps(x, _mm512_set1_ps(3.0f))), _mm512_set1_ps(1.0f / 6));
}

template <int ACT>
inline __m512 activate(__m512 x) {
  if (ACT == RELU) return _mm512_max_ps(x, _mm512_setzero_ps());
  if (ACT == GELU) {
    const __m512 h = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    return _mm512_fmadd_ps(h, erf(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f))), h);
  }
  if (ACT == GELU_TANH) {  // 0.5 x (1 + tanh(u)) = x sigmoid(2u)
    const __m512 c = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.0713548162726f), _mm512_set1_ps(1.59576912161f));
    return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(x, c)));
  }
  if (ACT == GELU_SHORT) return gelu_short(x);
  if (ACT == SILU) return _mm512_mul_ps(x, sigmoid(x));
  if (ACT == RELU6) return relu6(x);
  if (ACT == HARDSWISH) return _mm512_mul_ps(x, hardsigmoid(x));
  if (ACT == HARDSIGMOID) return hardsigmoid(x);
  if (ACT == SIGMOID) return sigmoid(x);
  if (ACT == SILU_SHORT) return _mm512_mul_ps(x, sigmoid_short(x));
  if (ACT == SIGMOID_SHORT) return sigmoid_short(x);
  return x;
}

inline __m512 from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// bfloat16, rounded half to even; NaN stays NaN.
inline __m256i to_bf16(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
  return _mm512_cvtepi32_epi16(up);
#endif
}

// round half to even, saturate to 0..255
inline __m128i to_u8(__m512 x) {
  const __m512 top = _mm512_min_ps(_mm512_max_ps(x, _mm512_setzero_ps()), _mm512_set1_ps(255.0f));
  return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(top));
}

}  // namespace qpass
