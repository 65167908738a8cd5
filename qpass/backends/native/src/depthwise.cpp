// Depthwise convolution of u8 images with s8 weights: 64 channels of a pixel at a time, the taps of a channel side by side (conv.h).
//
// Four taps a, b, c, d of 64 channels are interleaved to a0 b0 c0 d0 a1 b1 .., which the product instruction sums to one lane a channel.
// Unpacking works in the quarters of a register, so vector j holds the channels 16 q + 4 j + 0 .. 3 of quarters q = 0 .. 3; sums and factors
// stay in that order until packing to codes undoes it. Weights lie as [C / 64][taps / 4][4 vectors][16 lanes][4 taps]. Of 3 x 3 taps each
// column is filled up with a tap of weight 0, so that an interleaved column serves the next pixel of the line too.
#include <algorithm>

#include "conv.h"
#include "tile.h"

namespace qpass {

struct Block {
  const int8_t* w;
  int64_t channel;
  __mmask64 mask;
  __m512i start[4];
  __m512 alpha[4], beta[4], high[4];  // high: the largest codes, of each channel where slope is given
};

inline bool by_columns(const Conv& p) { return p.kernel[0] * p.kernel[1] == 3 && p.kernel[2] == 3; }

// vectors in the order of channels -> in that of unpacked ones, and back: the quarters as a matrix, transposed
inline void turn(__m512i (&s)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(s[0], s[1], 0x44), b = _mm512_shuffle_i32x4(s[2], s[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(s[0], s[1], 0xEE), d = _mm512_shuffle_i32x4(s[2], s[3], 0xEE);
  s[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  s[1] = _mm512_shuffle_i32x4(a, b, 0xDD);
  s[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  s[3] = _mm512_shuffle_i32x4(c, d, 0xDD);
}

inline void load_turned(const void* from, __mmask64 mask, __m512i (&s)[4]) {
  for (int j = 0; j < 4; j++) s[j] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask >> 16 * j), static_cast<const int32_t*>(from) + 16 * j);
  turn(s);
}

inline void interleave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i (&x)[4]) {
  const __m512i low_ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
  const __m512i low_cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
  x[0] = _mm512_unpacklo_epi16(low_ab, low_cd);
  x[1] = _mm512_unpackhi_epi16(low_ab, low_cd);
  x[2] = _mm512_unpacklo_epi16(high_ab, high_cd);
  x[3] = _mm512_unpackhi_epi16(high_ab, high_cd);
}

template <bool FULL>
inline __m512i codes(const uint8_t* from, const Block& block) {
  return FULL ? _mm512_loadu_si512(from + block.channel) : _mm512_maskz_loadu_epi8(block.mask, from + block.channel);
}

// any epilogue: the sums in the order of channels
void finish_slow(const Conv& p, const Phase& phase, const Task& task, const Block& block, int64_t i, __m512i (&sum)[4]) {
  const Epilogue e = epilogue(p);
  const int64_t image = task.image[i], left = p.n - block.channel;
  turn(sum);
  for (int q = 0; q < 4 && left > q * 16; q++) {
    const int64_t n = block.channel + q * 16;
    const __mmask16 some = lanes(left - q * 16);
    if (p.sample_scale) {
      const __m512i offset = _mm512_maskz_loadu_epi32(some, phase.offset + n);
      sum[q] = _mm512_sub_epi32(sum[q], _mm512_mullo_epi32(_mm512_set1_epi32(p.sample_zero[image]), offset));
    }
    const float sample = p.sample_scale ? p.sample_scale[image] : 1.0f;
    finish_lanes(e, sum[q], task.out[i], n, some, _mm512_maskz_loadu_ps(some, p.alpha + n), _mm512_maskz_loadu_ps(some, p.beta + n), sample);
  }
}

// QUICK: codes that an activation only clamps, of one zero point, with nothing added
template <bool QUICK, bool FULL>
__attribute__((always_inline)) inline void finish_sums(const Conv& p, const Phase& phase, const Task& task, const Block& block, int64_t i, __m512i (&sum)[4]) {
  if (!QUICK) return finish_slow(p, phase, task, block, i, sum);
  const __m512 low = _mm512_set1_ps(p.low);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[j]), block.alpha[j], block.beta[j]);
    sum[j] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(y, low), block.high[j]));
  }
  const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(sum[0], sum[1]), _mm512_packs_epi32(sum[2], sum[3]));
  uint8_t* out = static_cast<uint8_t*>(p.out) + task.out[i] * p.n + block.channel;
  if (FULL)
    _mm512_storeu_si512(out, packed);
  else
    _mm512_mask_storeu_epi8(out, block.mask, packed);
}

template <bool QUICK, bool FULL>
void each_pixel(const Conv& p, const Phase& phase, const Task& task, const Block& block, int64_t, int64_t count) {
  const int64_t taps = phase.taps.size();
  for (int64_t i = 0; i < count; i++) {
    __m512i sum[4] = {block.start[0], block.start[1], block.start[2], block.start[3]}, x[4];
    const int8_t* w = block.w;
    for (int64_t t = 0; t < taps; t += 4, w += 256) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) x[k] = codes<FULL>(task.rows[std::min(t + k, taps - 1) * count + i], block);
      interleave(x[0], x[1], x[2], x[3], x);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) Bytes::dot(sum[j], x[j], _mm512_loadu_si512(w + 64 * j));
    }
    finish_sums<QUICK, FULL>(p, phase, task, block, i, sum);
  }
}

// 3 x 3 taps: the next pixel of a line has all but SHIFT columns in common with this one
template <bool QUICK, bool FULL, int SHIFT>
void each_line(const Conv& p, const Phase& phase, const Task& task, const Block& block, int64_t first, int64_t count) {
  const int64_t width = phase.count[2];
  __m512i x[3][4];
  for (int64_t i = 0, at = first % width; i < count; i++, at = at + 1 == width ? 0 : at + 1) {
    const uint8_t* const* rows = task.rows.data() + i;
    const auto column = [&](int c) __attribute__((always_inline)) {
      interleave(codes<FULL>(rows[c * count], block), codes<FULL>(rows[(3 + c) * count], block), codes<FULL>(rows[(6 + c) * count], block), _mm512_setzero_si512(), x[c]);
    };
#pragma GCC unroll 3
    for (int c = 0; c < 3 - SHIFT; c++) {
      if (i == 0 || at == 0)
        column(c);
      else
        for (int j = 0; j < 4; j++) x[c][j] = x[c + SHIFT][j];
    }
#pragma GCC unroll 3
    for (int c = 3 - SHIFT; c < 3; c++) column(c);
    __m512i sum[4] = {block.start[0], block.start[1], block.start[2], block.start[3]};
#pragma GCC unroll 3
    for (int c = 0; c < 3; c++) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) Bytes::dot(sum[j], x[c][j], _mm512_loadu_si512(block.w + 256 * c + 64 * j));
    }
    finish_sums<QUICK, FULL>(p, phase, task, block, i, sum);
  }
}

template <bool QUICK, bool FULL>
void run(const Conv& p, const Phase& phase, const Task& task, const Block& block, int64_t first, int64_t count) {
  if (!by_columns(p)) return each_pixel<QUICK, FULL>(p, phase, task, block, first, count);
  if (p.stride[2] == p.dilation[2]) return each_line<QUICK, FULL, 1>(p, phase, task, block, first, count);
  if (p.stride[2] == 2 * p.dilation[2]) return each_line<QUICK, FULL, 2>(p, phase, task, block, first, count);
  each_line<QUICK, FULL, 3>(p, phase, task, block, first, count);
}

void run_depthwise(const Conv& p, const Phase& phase, const uint8_t* zeros, int64_t first, int64_t count) {
  static thread_local Task task;
  const int64_t fours = by_columns(p) ? 3 : (static_cast<int64_t>(phase.taps.size()) + 3) / 4;
  const bool quick = p.direct && !p.sample_scale && !p.other;
  write_rows(p, phase, zeros, first, count, task);
  for (int64_t channel = 0; channel < p.channels; channel += 64) {
    const int64_t left = p.channels - channel;
    Block block;
    block.w = p.w + channel / 64 * fours * 256;
    block.channel = channel;
    block.mask = left >= 64 ? ~0ull : (1ull << left) - 1;
    load_turned(phase.offset + channel, p.sample_scale ? 0 : block.mask, block.start);
    for (int j = 0; j < 4; j++) block.start[j] = _mm512_sub_epi32(_mm512_setzero_si512(), block.start[j]);
    load_turned(p.alpha + channel, block.mask, reinterpret_cast<__m512i(&)[4]>(block.alpha));
    load_turned(p.beta + channel, block.mask, reinterpret_cast<__m512i(&)[4]>(block.beta));
    for (int j = 0; j < 4; j++) block.high[j] = _mm512_set1_ps(p.high);
    if (p.slope) load_turned(p.slope + channel, block.mask, reinterpret_cast<__m512i(&)[4]>(block.high));
    if (left >= 64)
      quick ? run<true, true>(p, phase, task, block, first, count) : run<false, true>(p, phase, task, block, first, count);
    else
      quick ? run<true, false>(p, phase, task, block, first, count) : run<false, false>(p, phase, task, block, first, count);
  }
}

}  // namespace qpass
