// See image.h: a block of pixels is quantized plane by plane into a small buffer, from which its codes are interleaved.
#include "image.h"

#include <algorithm>
#include <cstring>

#include "simd.h"
#include "team.h"

namespace qpass {

constexpr int64_t BLOCK = 512;  // pixels
constexpr int64_t FEW = 16;     // channels, at most (conv_pack.py)

// x / scale rounded as a division is: the residual of a product with the reciprocal corrects it (Markstein 1990)
inline __m512 divide(__m512 x, __m512 scale, __m512 inverse) {
  const __m512 q = _mm512_mul_ps(x, inverse);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(q, scale, x), inverse, q);
}

inline void codes_of(const Image& p, const float* from, int64_t count, uint8_t* to) {
  const __m512 scale = _mm512_set1_ps(p.scale), inverse = _mm512_set1_ps(1.0f / p.scale), zero = _mm512_set1_ps(p.zero), max = _mm512_set1_ps(p.max);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = lanes(count - i);
    const __m512 y = _mm512_roundscale_ps(divide(_mm512_maskz_loadu_ps(mask, from + i), scale, inverse), 8);
    const __m512 code = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(y, zero), _mm512_setzero_ps()), max);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code)));
  }
}

// sixteen pixels of three planes
inline void interleave_three(const uint8_t* codes, uint8_t* out) {
  constexpr char N = -1;
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + BLOCK));
  const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 2 * BLOCK));
  const __m128i order[3][3] = {
      {_mm_setr_epi8(0, N, N, 1, N, N, 2, N, N, 3, N, N, 4, N, N, 5), _mm_setr_epi8(N, 0, N, N, 1, N, N, 2, N, N, 3, N, N, 4, N, N), _mm_setr_epi8(N, N, 0, N, N, 1, N, N, 2, N, N, 3, N, N, 4, N)},
      {_mm_setr_epi8(N, N, 6, N, N, 7, N, N, 8, N, N, 9, N, N, 10, N), _mm_setr_epi8(5, N, N, 6, N, N, 7, N, N, 8, N, N, 9, N, N, 10), _mm_setr_epi8(N, 5, N, N, 6, N, N, 7, N, N, 8, N, N, 9, N, N)},
      {_mm_setr_epi8(N, 11, N, N, 12, N, N, 13, N, N, 14, N, N, 15, N, N), _mm_setr_epi8(N, N, 11, N, N, 12, N, N, 13, N, N, 14, N, N, 15, N), _mm_setr_epi8(10, N, N, 11, N, N, 12, N, N, 13, N, N, 14, N, N, 15)},
  };
  for (int i = 0; i < 3; i++) {
    const __m128i mixed = _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(a, order[i][0]), _mm_shuffle_epi8(b, order[i][1])), _mm_shuffle_epi8(c, order[i][2]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), mixed);
  }
}

template <int C>  // 0: any
inline void interleave(const uint8_t* codes, int64_t channels, int64_t count, uint8_t* out) {
  const int64_t c_end = C ? C : channels;
  int64_t i = 0;
  for (; C == 3 && i + 16 <= count; i += 16) interleave_three(codes + i, out + 3 * i);
  for (; i < count; i++)
    for (int64_t c = 0; c < c_end; c++) out[i * c_end + c] = codes[c * BLOCK + i];
}

void run_image(const Image& p, bool shared) {
  const int64_t blocks = (p.pixels + BLOCK - 1) / BLOCK;
  each_task(p.batch * blocks, shared, [&](int64_t task) {
    alignas(64) uint8_t codes[FEW * BLOCK];
    const int64_t image = task / blocks, first = task % blocks * BLOCK, count = std::min(BLOCK, p.pixels - first);
    for (int64_t c = 0; c < p.channels; c++) codes_of(p, p.x + (image * p.channels + c) * p.pixels + first, count, codes + c * BLOCK);
    uint8_t* out = p.out + (image * p.pixels + first) * p.channels;
    if (p.channels == 1)
      std::memcpy(out, codes, count);
    else
      p.channels == 3 ? interleave<3>(codes, 3, count, out) : interleave<0>(codes, p.channels, count, out);
  });
}

}  // namespace qpass

extern "C" void qpass_image(const qpass::Image* args) {
  const qpass::Image& p = *args;
#pragma omp parallel num_threads(p.threads) if (p.batch * p.pixels * p.channels > (1 << 14))
  qpass::run_image(p, true);
}
