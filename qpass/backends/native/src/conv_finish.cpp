// What follows the sums of a convolution, for every activation and type (conv.h).
#include "conv_codes.h"

namespace qpass {

// sixteen results
template <int ACT>
inline __m512 result(const Conv& p, __m512i sums, int64_t n, int64_t to, int32_t sample, __mmask16 mask) {
  __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_maskz_loadu_ps(mask, p.alpha + n));
  if (p.sample_scale) y = _mm512_mul_ps(y, _mm512_set1_ps(p.sample_scale[sample]));
  y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p.beta + n));
  if (p.other) {
    const __m512 other = load(p.other, p.other_type, to, mask);
    if (p.other_type == U8)
      y = _mm512_fmadd_ps(_mm512_sub_ps(other, _mm512_set1_ps(p.other_zero)), _mm512_set1_ps(p.other_scale), y);
    else
      y = _mm512_add_ps(y, other);
  }
  if (ACT != PRELU) return activate<ACT>(y);
  const __mmask16 below = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_mul_ps(y, below, y, _mm512_maskz_loadu_ps(mask, p.slope + n));
}

// columns: at most 64
template <int ACT>
void finish_as(const Conv& p, const int32_t* sums, int64_t ld, const int64_t* at, const int32_t* sample, int rows, int64_t n,
               int64_t columns) {
  const __m512i zero = _mm512_set1_epi32(static_cast<int>(p.out_zero));
  const __m512i high = _mm512_set1_epi8(static_cast<char>(p.high));
  const __mmask64 all = columns >= 64 ? ~0ull : (1ull << columns) - 1;
  for (int r = 0; r < rows; r++) {
    const int64_t to = at[r] * p.n + n;
    __m512i q[4] = {};
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      if (16 * v >= columns) break;
      const __mmask16 mask = static_cast<__mmask16>(all >> 16 * v);
      const __m512i sum = _mm512_loadu_si512(sums + r * ld + 16 * v);
      const __m512 y = result<ACT>(p, sum, n + 16 * v, to + 16 * v, sample[r], mask);
      if (p.out_type == U8)
        q[v] = _mm512_add_epi32(to_codes(_mm512_mul_ps(y, _mm512_set1_ps(p.out_inverse))), zero);
      else
        store(p.out, p.out_type, to + 16 * v, mask, y, 1.0f, 0);
    }
    if (p.out_type == U8)
      _mm512_mask_storeu_epi8(static_cast<uint8_t*>(p.out) + to, all, _mm512_min_epu8(in_order<4>(q), high));
  }
}

using FinishAs = void (*)(const Conv&, const int32_t*, int64_t, const int64_t*, const int32_t*, int, int64_t, int64_t);
constexpr FinishAs FINISH_AS[] = {finish_as<NONE>,       finish_as<RELU>,      finish_as<GELU>,        finish_as<GELU_TANH>,
                                  finish_as<SILU>,       finish_as<GELU_SHORT>, finish_as<RELU6>,       finish_as<HARDSWISH>,
                                  finish_as<HARDSIGMOID>, finish_as<SIGMOID>,   finish_as<PRELU>,
                                  finish_as<SILU_SHORT>, finish_as<SIGMOID_SHORT>};

void finish(const Conv& p, const int32_t* sums, int64_t ld, const int64_t* at, const int32_t* sample, int rows, int64_t n,
            int64_t columns) {
  const int act = p.out_type == U8 ? short_for_codes(p.act, p.out_inverse) : p.act;
  FINISH_AS[act](p, sums, ld, at, sample, rows, n, columns);
}

}  // namespace qpass
