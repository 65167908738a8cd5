// Layer norm (or RMS norm) and the quantize behind it, in one pass over memory; a row stays in the L1 cache.
//
//     y = (x - mean) / sqrt(var + eps) * weight + bias        rms: y = x / sqrt(mean(x^2) + eps) * weight
//     z = y * mul + add                                       mul, add: per column
//
// static: codes = clamp(round(z)), with scale and zero point already in mul and add. dynamic: each row gets its scale and
// zero point from its own smallest and largest z, as qpass/affine.py says. y is stored too where somebody else reads it.
#include <vector>

#include "simd.h"

namespace qpass {

struct Norm {
  const float *x, *weight, *bias, *mul, *add;
  float* out;
  uint8_t* codes;
  float* row_scale;
  int32_t* row_zero;
  int64_t rows, width;
  int32_t rms, threads;
  float eps;
};

template <class F>
inline void each(int64_t width, F f) {
  for (int64_t c = 0; c < width; c += 16) f(c, lanes(width - c));
}

inline __m512 load(const float* p, int64_t c, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p + c); }

// the row's z, in `z`; y goes to p.out where asked
void normalize(const Norm& p, int64_t row, float* z) {
  const float* x = p.x + row * p.width;
  __m512 sum = _mm512_setzero_ps();
  if (!p.rms) each(p.width, [&](int64_t c, __mmask16 m) { sum = _mm512_add_ps(sum, load(x, c, m)); });
  const float mean = _mm512_reduce_add_ps(sum) / p.width;
  __m512 squares = _mm512_setzero_ps();
  each(p.width, [&](int64_t c, __mmask16 m) {
    const __m512 d = _mm512_maskz_sub_ps(m, load(x, c, m), _mm512_set1_ps(mean));
    squares = _mm512_fmadd_ps(d, d, squares);
  });
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / p.width + p.eps));
  each(p.width, [&](int64_t c, __mmask16 m) {
    __m512 y = _mm512_mul_ps(_mm512_sub_ps(load(x, c, m), _mm512_set1_ps(mean)), factor);
    if (p.weight) y = _mm512_mul_ps(y, load(p.weight, c, m));
    if (p.bias) y = _mm512_add_ps(y, load(p.bias, c, m));
    if (p.out) _mm512_mask_storeu_ps(p.out + row * p.width + c, m, y);
    _mm512_mask_storeu_ps(z + c, m, _mm512_fmadd_ps(y, load(p.mul, c, m), load(p.add, c, m)));
  });
}

void quantize_static(const Norm& p, int64_t row, const float* z) {
  each(p.width, [&](int64_t c, __mmask16 m) {
    _mm_mask_storeu_epi8(p.codes + row * p.width + c, m, to_u8(load(z, c, m)));
  });
}

void quantize_dynamic(const Norm& p, int64_t row, const float* z) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  each(p.width, [&](int64_t c, __mmask16 m) {
    low = _mm512_mask_min_ps(low, m, low, load(z, c, m));
    high = _mm512_mask_max_ps(high, m, high, load(z, c, m));
  });
  const float lo = _mm512_reduce_min_ps(low), hi = _mm512_reduce_max_ps(high);
  const float scale = lo == hi ? 1.0f : std::fmax(hi / 255 - lo / 255, 1.17549435e-38f);
  const float zero = std::fmin(std::fmax(std::nearbyint(-lo / scale), 0.0f), 255.0f);
  p.row_scale[row] = scale;
  p.row_zero[row] = static_cast<int32_t>(zero);
  each(p.width, [&](int64_t c, __mmask16 m) {
    const __m512 q = _mm512_roundscale_ps(_mm512_div_ps(load(z, c, m), _mm512_set1_ps(scale)), 8);
    _mm_mask_storeu_epi8(p.codes + row * p.width + c, m, to_u8(_mm512_add_ps(q, _mm512_set1_ps(zero))));
  });
}

}  // namespace qpass

extern "C" void qpass_norm(const qpass::Norm* args) {
  const qpass::Norm& p = *args;
  const bool parallel = p.threads > 1 && p.rows > 1 && p.rows * p.width > (1 << 14);
#pragma omp parallel num_threads(p.threads) if (parallel)
  {
    static thread_local std::vector<float> z;
    z.resize(p.width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; row++) {
      qpass::normalize(p, row, z.data());
      if (p.row_scale)
        qpass::quantize_dynamic(p, row, z.data());
      else
        qpass::quantize_static(p, row, z.data());
    }
  }
}
