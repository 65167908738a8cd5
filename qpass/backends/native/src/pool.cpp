// See pool.h: 64 channels of a window at a time.
#include "pool.h"

#include <algorithm>

#include "simd.h"
#include "team.h"

namespace qpass {

struct Window {
  int64_t first, count;  // the first position inside the image, and how many taps lie inside
};

inline Window window(const Pool& p, int axis, int64_t out) {
  const int64_t start = out * p.stride[axis] - p.padding[axis], step = p.dilation[axis];
  const int64_t skipped = start < 0 ? (step - 1 - start) / step : 0, first = start + skipped * step;
  const int64_t inside = first < p.in[axis] ? (p.in[axis] - first + step - 1) / step : 0;
  return {first, std::max<int64_t>(0, std::min(inside, p.kernel[axis] - skipped))};
}

inline void pool_line(const Pool& p, const uint8_t* image, const Window& z, const Window& y, uint8_t* out) {
  const int64_t row = p.in[2] * p.channels, plane = p.in[1] * row;
  for (int64_t i = 0; i < p.size[2]; i++, out += p.channels) {
    const Window x = window(p, 2, i);
    for (int64_t c = 0; c < p.channels; c += 64) {
      const __mmask64 mask = p.channels - c >= 64 ? ~0ull : (1ull << (p.channels - c)) - 1;
      __m512i top = _mm512_setzero_si512();
      for (int64_t a = 0; a < z.count; a++)
        for (int64_t b = 0; b < y.count; b++) {
          const uint8_t* from = image + (z.first + a * p.dilation[0]) * plane + (y.first + b * p.dilation[1]) * row + x.first * p.channels + c;
          for (int64_t k = 0; k < x.count; k++) top = _mm512_max_epu8(top, _mm512_maskz_loadu_epi8(mask, from + k * p.dilation[2] * p.channels));
        }
      if (mask == ~0ull)
        _mm512_storeu_si512(out + c, top);
      else
        _mm512_mask_storeu_epi8(out + c, mask, top);
    }
  }
}

void run_pool(const Pool& p, bool shared) {
  const int64_t lines = p.batch * p.size[0] * p.size[1], line = p.size[2] * p.channels, some = line > (1 << 12) ? 1 : 8;
  each_task((lines + some - 1) / some, shared, [&](int64_t task) {
    for (int64_t i = task * some; i < std::min(lines, (task + 1) * some); i++) {
      const uint8_t* image = p.x + i / (p.size[0] * p.size[1]) * p.in[0] * p.in[1] * p.in[2] * p.channels;
      pool_line(p, image, window(p, 0, i / p.size[1] % p.size[0]), window(p, 1, i % p.size[1]), p.out + i * line);
    }
  });
}

}  // namespace qpass

extern "C" void qpass_pool(const qpass::Pool* args) {
  const qpass::Pool& p = *args;
#pragma omp parallel num_threads(p.threads) if (p.batch * p.size[0] * p.size[1] * p.size[2] * p.channels > (1 << 14))
  qpass::run_pool(p, true);
}
