// What follows the sums of a convolution, for every activation and type (conv.h).
#include "conv.h"

namespace qpass {

template <int ACT>
void finish_as(const Conv& p, const int32_t* sums, int64_t ld, const int64_t* at, const int32_t* sample, int rows, int64_t n,
               int64_t columns) {
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 mask = lanes(columns - c);
    const __m512 alpha = _mm512_maskz_loadu_ps(mask, p.alpha + n + c), beta = _mm512_maskz_loadu_ps(mask, p.beta + n + c);
    const __m512 slope = ACT == PRELU ? _mm512_maskz_loadu_ps(mask, p.slope + n + c) : _mm512_setzero_ps();
    for (int r = 0; r < rows; r++) {
      const int64_t to = at[r] * p.n + n + c;
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + r * ld + c)), alpha);
      if (p.sample_scale) y = _mm512_mul_ps(y, _mm512_set1_ps(p.sample_scale[sample[r]]));
      y = _mm512_add_ps(y, beta);
      if (p.other) {
        const __m512 other = load(p.other, p.other_type, to, mask);
        if (p.other_type == U8)
          y = _mm512_fmadd_ps(_mm512_sub_ps(other, _mm512_set1_ps(p.other_zero)), _mm512_set1_ps(p.other_scale), y);
        else
          y = _mm512_add_ps(y, other);
      }
      if (ACT == PRELU)
        y = _mm512_mask_mul_ps(y, _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ), y, slope);
      else
        y = activate<ACT>(y);
      store(p.out, p.out_type, to, mask, y, p.out_inverse, static_cast<int>(p.out_zero), p.high);
    }
  }
}

using FinishAs = void (*)(const Conv&, const int32_t*, int64_t, const int64_t*, const int32_t*, int, int64_t, int64_t);
constexpr FinishAs FINISH_AS[] = {finish_as<NONE>,       finish_as<RELU>,      finish_as<GELU>,        finish_as<GELU_TANH>,
                                  finish_as<SILU>,       finish_as<GELU_SHORT>, finish_as<RELU6>,       finish_as<HARDSWISH>,
                                  finish_as<HARDSIGMOID>, finish_as<SIGMOID>,   finish_as<PRELU>};

void finish(const Conv& p, const int32_t* sums, int64_t ld, const int64_t* at, const int32_t* sample, int rows, int64_t n,
            int64_t columns) {
  FINISH_AS[p.act](p, sums, ld, at, sample, rows, n, columns);
}

}  // namespace qpass
