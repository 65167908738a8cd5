// See image.h: a block of pixels is quantized plane by plane into a small buffer, from which its codes are interleaved.
#include "image.h"

#include <algorithm>
#include <cstring>

#include "simd.h"
#include "team.h"

namespace qpass {

constexpr int64_t BLOCK = 512;  // pixels
constexpr int64_t FEW = 16;     // channels, at most (conv_pack.py)

inline void codes_of(const Image& p, const float* from, int64_t count, uint8_t* to) {
  const __m512 scale = _mm512_set1_ps(p.scale), zero = _mm512_set1_ps(p.zero), max = _mm512_set1_ps(p.max);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = lanes(count - i);
    const __m512 y = _mm512_roundscale_ps(_mm512_div_ps(_mm512_maskz_loadu_ps(mask, from + i), scale), 8);
    const __m512 code = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(y, zero), _mm512_setzero_ps()), max);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code)));
  }
}

template <int C>  // 0: any
inline void interleave(const uint8_t* codes, int64_t channels, int64_t count, uint8_t* out) {
  const int64_t c_end = C ? C : channels;
  for (int64_t i = 0; i < count; i++)
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
