// Pooling of u8 images, channels last: the largest code of each window, or the mean of codes, times mul plus add.
#include <algorithm>

#include "simd.h"

namespace qpass {

struct Pool {
  const uint8_t* x;
  void* out;
  int64_t batch, channels;
  int64_t in[3], size[3], kernel[3], stride[3], padding[3], dilation[3];
  int32_t mean, to_float, threads;
  float mul, add;
};

inline void pool_pixel(const Pool& p, int64_t image, const int64_t* out, int64_t row) {
  const int64_t plane = p.in[0] * p.in[1] * p.in[2];
  for (int64_t c = 0; c < p.channels; c += 64) {
    const __mmask64 mask = p.channels - c >= 64 ? ~0ull : (1ull << (p.channels - c)) - 1;
    __m512i top = _mm512_setzero_si512(), sum[4] = {top, top, top, top};
    for (int64_t z = 0; z < p.kernel[0]; z++)
      for (int64_t y = 0; y < p.kernel[1]; y++)
        for (int64_t x = 0; x < p.kernel[2]; x++) {
          const int64_t k[3] = {z, y, x};
          int64_t at[3];
          bool inside = true;
          for (int i = 0; i < 3; i++) {
            at[i] = out[i] * p.stride[i] - p.padding[i] + k[i] * p.dilation[i];
            inside = inside && at[i] >= 0 && at[i] < p.in[i];
          }
          if (!inside) continue;
          const uint8_t* from = p.x + (image * plane + (at[0] * p.in[1] + at[1]) * p.in[2] + at[2]) * p.channels + c;
          const __m512i codes = _mm512_maskz_loadu_epi8(mask, from);
          top = _mm512_max_epu8(top, codes);
          if (!p.mean) continue;
          sum[0] = _mm512_add_epi32(sum[0], _mm512_cvtepu8_epi32(_mm512_castsi512_si128(codes)));
          sum[1] = _mm512_add_epi32(sum[1], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(codes, 1)));
          sum[2] = _mm512_add_epi32(sum[2], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(codes, 2)));
          sum[3] = _mm512_add_epi32(sum[3], _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(codes, 3)));
        }
    const int64_t to = row * p.channels + c;
    if (!p.mean) {
      _mm512_mask_storeu_epi8(static_cast<uint8_t*>(p.out) + to, mask, top);
      continue;
    }
    for (int q = 0; q < 4 && c + q * 16 < p.channels; q++) {
      const __mmask16 some = lanes(p.channels - c - q * 16);
      const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[q]), _mm512_set1_ps(p.mul), _mm512_set1_ps(p.add));
      if (p.to_float)
        _mm512_mask_storeu_ps(static_cast<float*>(p.out) + to + q * 16, some, y);
      else
        _mm_mask_storeu_epi8(static_cast<uint8_t*>(p.out) + to + q * 16, some, to_u8(y));
    }
  }
}

}  // namespace qpass

extern "C" void qpass_pool(const qpass::Pool* args) {
  const qpass::Pool& p = *args;
  const int64_t pixels = p.batch * p.size[0] * p.size[1] * p.size[2];
#pragma omp parallel for schedule(static) num_threads(p.threads) if (pixels * p.channels > (1 << 14))
  for (int64_t row = 0; row < pixels; row++) {
    const int64_t out[3] = {row / (p.size[1] * p.size[2]) % p.size[0], row / p.size[2] % p.size[1], row % p.size[2]};
    qpass::pool_pixel(p, row / (p.size[0] * p.size[1] * p.size[2]), out, row);
  }
}
