// Maximum and mean over windows of u8 images that lie channels-last: [batch][depth][height][width][channels].
//
//     max:  the largest code of a window; padding never is
//     mean: mean of the codes * mul + add; padding counts as pad_code, or not at all
//
// A pixel of the output at a time, 64 channels of it in registers over all of its window.
#include <algorithm>

#include "values.h"

namespace qpass {

struct Pool {
  const uint8_t* x;
  void* out;
  int64_t batch, channels, in[3], size[3], kernel[3], stride[3], padding[3], dilation[3];
  int32_t mean, include_pad, pad_code, out_type, threads;
  float mul, add;
};

// The inputs first, first + step, .. (count of them) of a window along one axis; whole: with those in the padding.
struct Window {
  int64_t first, step, count, whole;
};

Window window(const Pool& p, int axis, int64_t at) {
  const int64_t start = at * p.stride[axis] - p.padding[axis], step = p.dilation[axis], in = p.in[axis];
  const int64_t skipped = start < 0 ? (-start + step - 1) / step : 0;
  const int64_t end = std::min(p.kernel[axis], (in - start + step - 1) / step);
  const int64_t whole = std::min(p.kernel[axis], in + p.padding[axis] - start);
  return {start + skipped * step, step, std::max<int64_t>(0, end - skipped), whole};
}

template <class F>
inline void each(const Pool& p, const uint8_t* image, const Window (&w)[3], F f) {
  for (int64_t d = 0; d < w[0].count; d++)
    for (int64_t h = 0; h < w[1].count; h++) {
      const int64_t line = (w[0].first + d * w[0].step) * p.in[1] + w[1].first + h * w[1].step;
      const uint8_t* from = image + (line * p.in[2] + w[2].first) * p.channels;
      for (int64_t i = 0; i < w[2].count; i++, from += w[2].step * p.channels) f(from);
    }
}

void max_pixel(const Pool& p, const uint8_t* image, const Window (&w)[3], int64_t to) {
  for (int64_t c = 0; c < p.channels; c += 64) {
    const __mmask64 mask = p.channels - c >= 64 ? ~0ull : (1ull << (p.channels - c)) - 1;
    __m512i most = _mm512_setzero_si512();
    each(p, image, w, [&](const uint8_t* x) { most = _mm512_max_epu8(most, _mm512_maskz_loadu_epi8(mask, x + c)); });
    _mm512_mask_storeu_epi8(static_cast<uint8_t*>(p.out) + to + c, mask, most);
  }
}

void mean_pixel(const Pool& p, const uint8_t* image, const Window (&w)[3], int64_t to) {
  const int64_t real = w[0].count * w[1].count * w[2].count, whole = w[0].whole * w[1].whole * w[2].whole;
  const __m512i start = _mm512_set1_epi32(p.include_pad ? static_cast<int>((whole - real) * p.pad_code) : 0);
  const __m512 divisor = _mm512_set1_ps(static_cast<float>(p.include_pad ? whole : real));
  for (int64_t c = 0; c < p.channels; c += 64) {
    __mmask16 mask[4];
    for (int v = 0; v < 4; v++) mask[v] = lanes(std::max<int64_t>(0, p.channels - c - 16 * v));
    __m512i sum[] = {start, start, start, start};
    each(p, image, w, [&](const uint8_t* x) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++)
        sum[v] = _mm512_add_epi32(sum[v], _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask[v], x + c + 16 * v)));
    });
    for (int v = 0; v < 4; v++) {
      const __m512 mean = _mm512_div_ps(_mm512_cvtepi32_ps(sum[v]), divisor);
      const __m512 y = _mm512_fmadd_ps(mean, _mm512_set1_ps(p.mul), _mm512_set1_ps(p.add));
      store(p.out, p.out_type, to + c + 16 * v, mask[v], y, 1.0f, 0);
    }
  }
}

}  // namespace qpass

extern "C" void qpass_pool(const qpass::Pool* args) {
  const qpass::Pool& p = *args;
  const int64_t pixels = p.batch * p.size[0] * p.size[1] * p.size[2];
  const int64_t work = pixels * p.channels * p.kernel[0] * p.kernel[1] * p.kernel[2];
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1 && pixels > 1 && work > (1 << 19))
  for (int64_t pixel = 0; pixel < pixels; pixel++) {
    const int64_t line = pixel / p.size[2], plane = line / p.size[1], b = plane / p.size[0];
    const qpass::Window w[] = {qpass::window(p, 0, plane % p.size[0]), qpass::window(p, 1, line % p.size[1]),
                               qpass::window(p, 2, pixel % p.size[2])};
    const uint8_t* image = p.x + b * p.in[0] * p.in[1] * p.in[2] * p.channels;
    (p.mean ? qpass::mean_pixel : qpass::max_pixel)(p, image, w, pixel * p.channels);
  }
}
