// Depthwise convolution of u8 images with s8 weights: 64 channels of a pixel at a time, the taps of a channel side by side (conv.h).
//
// Four taps a, b, c, d of 64 channels are interleaved to a0 b0 c0 d0 a1 b1 .., which the product instruction sums to one lane a channel.
// Unpacking works in the quarters of a register, so vector j holds the channels 16 q + 4 j + 0 .. 3 of quarters q = 0 .. 3; sums and factors
// stay in that order until packing to codes undoes it. Weights lie as [C / 64][taps / 4][4 vectors][16 lanes][4 taps]. Of 3 x 3 taps each
// column is filled up with a tap of weight 0, so that an interleaved column serves every output of the line that sees it.
#include <algorithm>

#include "conv.h"
#include "tile.h"

namespace qpass {

struct Block {
  const int8_t* w;
  int64_t channel;
  __mmask64 mask;
  __m512i start[4];
  __m512 alpha[4], beta[4];
  __m512i low, high;    // bytes, in the order of channels
  __m512 least, most;   // of floats; where these are written, factors lie in the order of channels too
  float sample;
  bool floats;
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
__attribute__((noinline)) void finish_slow(const Conv& p, const Block& block, int64_t row, __m512i (&sum)[4]) {
  const Epilogue e = epilogue(p);
  const int64_t left = p.n - block.channel;
  turn(sum);
  for (int q = 0; q < 4 && left > q * 16; q++) {
    const int64_t n = block.channel + q * 16;
    const __mmask16 some = lanes(left - q * 16);
    finish_lanes(e, sum[q], row, n, some, _mm512_maskz_loadu_ps(some, p.alpha + n), _mm512_maskz_loadu_ps(some, p.beta + n), block.sample);
  }
}

// float32 that an activation only clamps, nothing added: sixteen values a vector in the order of channels
__attribute__((always_inline)) inline void finish_floats(const Conv& p, const Block& block, int64_t row, __m512i (&sum)[4]) {
  turn(sum);
  float* out = static_cast<float*>(p.out) + row * p.n + block.channel;
#pragma GCC unroll 4
  for (int q = 0; q < 4; q++) {
    const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[q]), block.alpha[q], block.beta[q]);
    _mm512_mask_storeu_ps(out + 16 * q, static_cast<__mmask16>(block.mask >> 16 * q), _mm512_min_ps(_mm512_max_ps(y, block.least), block.most));
  }
}

// QUICK: codes that an activation only clamps, with nothing added. row: of the output
template <bool QUICK, bool FULL>
__attribute__((always_inline)) inline void finish_sums(const Conv& p, const Block& block, int64_t row, const __m512i (&sum)[4]) {
  __m512i code[4];
  if (!QUICK) {
    for (int j = 0; j < 4; j++) code[j] = sum[j];
    return block.floats ? finish_floats(p, block, row, code) : finish_slow(p, block, row, code);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) code[j] = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[j]), block.alpha[j], block.beta[j]));
  const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
  const __m512i clamped = _mm512_max_epu8(_mm512_min_epu8(packed, block.high), block.low);
  uint8_t* out = static_cast<uint8_t*>(p.out) + row * p.n + block.channel;
  if (FULL)
    _mm512_storeu_si512(out, clamped);
  else
    _mm512_mask_storeu_epi8(out, block.mask, clamped);
}

// any kernel: pixels first .. first + count - 1 of the task's rows
template <bool QUICK, bool FULL>
void each_pixel(const Conv& p, const Phase& phase, const Task& task, const Block& block, int64_t count) {
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
    finish_sums<QUICK, FULL>(p, block, task.out[i], sum);
  }
}

// one output line of a kernel of 3 lines by 3: where these lie, and how far their pixels are apart (0: a line of zero points)
struct Line {
  const uint8_t *from[3], *zero;
  int64_t move[3], row;
};

struct Sums {
  __m512i lane[4];
};

// A column of three pixels is interleaved once and added to each output that sees it. SHIFT: columns from an output to the next.
template <bool QUICK, bool FULL, int SHIFT>
void each_line(const Conv& p, const Block& block, const Line& line, int64_t count) {
  const int64_t width = p.in[2], step = SHIFT == 3 ? p.stride[2] : SHIFT * p.dilation[2];
  const Sums start = {{block.start[0], block.start[1], block.start[2], block.start[3]}};
  const uint8_t *from[3], *zero = line.zero;
  int64_t move[3];
  for (int k = 0; k < 3; k++) from[k] = line.from[k], move[k] = line.move[k];
  const auto column = [&](int64_t x, __m512i(&to)[4]) __attribute__((always_inline)) {
    const bool inside = static_cast<uint64_t>(x) < static_cast<uint64_t>(width);
    __m512i in[3];
#pragma GCC unroll 3
    for (int k = 0; k < 3; k++) in[k] = codes<FULL>(inside ? from[k] + x * move[k] : zero, block);
    interleave(in[0], in[1], in[2], _mm512_setzero_si512(), to);
  };
  const auto add = [&](Sums& sums, const __m512i(&x)[4], int tap) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) Bytes::dot(sums.lane[j], x[j], _mm512_loadu_si512(block.w + 256 * tap + 64 * j));
  };
  Sums a = start, b = start, c = start;
  int64_t x = -p.padding[2];
  const int64_t d = p.dilation[2];
  __m512i in[4];
  if (SHIFT < 3) column(x, in), add(a, in, 0);
  if (SHIFT == 1) column(x + d, in), add(a, in, 1), add(b, in, 0);
  for (int64_t i = 0; i < count; i++, x += step) {
    if (SHIFT == 3) column(x, in), add(a, in, 0);
    if (SHIFT > 1) column(x + d, in), add(a, in, 1);
    column(x + 2 * d, in), add(a, in, 2);
    if (SHIFT == 1) add(b, in, 1), add(c, in, 0);
    if (SHIFT == 2) add(b, in, 0);
    finish_sums<QUICK, FULL>(p, block, line.row + i, a.lane);
    a = SHIFT == 3 ? start : b;
    b = SHIFT == 1 ? c : start;
    c = start;
  }
}

template <bool QUICK, bool FULL>
void run(const Conv& p, const Phase& phase, const Task& task, const std::vector<Line>& lines, const Block& block, int64_t count) {
  if (!by_columns(p)) return each_pixel<QUICK, FULL>(p, phase, task, block, count);
  const int64_t move = p.stride[2], once = p.dilation[2];
  const auto walk = move == once ? each_line<QUICK, FULL, 1> : move == 2 * once ? each_line<QUICK, FULL, 2> : each_line<QUICK, FULL, 3>;
  for (const Line& line : lines) walk(p, block, line, phase.count[2]);
}

void write_lines(const Conv& p, const Phase& phase, const uint8_t* zeros, int64_t first, int64_t count, std::vector<Line>& lines) {
  lines.resize(count);
  for (int64_t i = 0; i < count; i++) {
    const int64_t y = (first + i) % phase.count[1], rest = (first + i) / phase.count[1], z = rest % phase.count[0], image = rest / phase.count[0];
    const uint8_t* zero = zeros + (p.sample_zero ? image * (p.channels + SLACK) : 0);
    Line line{{zero, zero, zero}, zero, {0, 0, 0}, (first + i) * phase.count[2]};
    for (int k = 0; k < 3; k++) {
      const Tap& tap = phase.taps[3 * k];
      const int64_t d = locate(p, 0, z, tap), h = locate(p, 1, y, tap);
      if (d < 0 || d >= p.in[0] || h < 0 || h >= p.in[1]) continue;
      line.from[k] = p.x + ((image * p.in[0] + d) * p.in[1] + h) * p.in[2] * p.ld;
      line.move[k] = p.ld;
    }
    lines[i] = line;
  }
}

int64_t depthwise_units(const Conv& p, const Phase& phase) { return by_columns(p) ? phase.pixels / phase.count[2] : phase.pixels; }

void run_depthwise(const Conv& p, const Phase& phase, const uint8_t* zeros, int64_t first, int64_t count, int64_t panel, int64_t panel_end) {
  static thread_local Task task;
  static thread_local std::vector<Line> lines;
  const int64_t fours = by_columns(p) ? 3 : (static_cast<int64_t>(phase.taps.size()) + 3) / 4;
  const bool quick = is_quick(p) && p.direct && !p.other;
  const Sample sample = sample_of(p, first / (depthwise_units(p, phase) / p.batch));
  if (by_columns(p))
    write_lines(p, phase, zeros, first, count, lines);
  else
    write_rows(p, phase, zeros, first, count, task);
  for (; panel < panel_end; panel++) {
    const int64_t channel = panel * 64, left = p.channels - channel;
    Block block;
    block.w = p.w + panel * fours * 256;
    block.channel = channel;
    block.mask = left >= 64 ? ~0ull : (1ull << left) - 1;
    load_turned(phase.offset + channel, block.mask, block.start);
    for (int j = 0; j < 4; j++) block.start[j] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_mullo_epi32(block.start[j], _mm512_set1_epi32(sample.zero)));
    block.sample = sample.scale;
    block.floats = !p.other && p.out_type == F32 && is_quick(p);
    if (block.floats) {
      const Panel factors = panel_of(epilogue(p), channel, p.n, sample.scale);
      for (int j = 0; j < 4; j++) block.alpha[j] = factors.alpha[j], block.beta[j] = factors.beta[j];
      block.least = _mm512_set1_ps(p.act == CONV_NONE ? -INFINITY : 0.0f), block.most = _mm512_set1_ps(p.act == CONV_RELU6 ? 6.0f : INFINITY);
    } else {
      load_turned(p.alpha + channel, block.mask, reinterpret_cast<__m512i(&)[4]>(block.alpha));
      load_turned(p.beta + channel, block.mask, reinterpret_cast<__m512i(&)[4]>(block.beta));
      for (int j = 0; j < 4; j++) block.alpha[j] = _mm512_mul_ps(block.alpha[j], _mm512_set1_ps(sample.scale));
    }
    if (quick) {
      const Panel bounds = panel_of(epilogue(p), channel, p.n, 1.0f);
      block.low = bounds.low, block.high = bounds.high;
    }
    if (left >= 64)
      quick ? run<true, true>(p, phase, task, lines, block, count) : run<false, true>(p, phase, task, lines, block, count);
    else
      quick ? run<true, false>(p, phase, task, lines, block, count) : run<false, false>(p, phase, task, lines, block, count);
  }
}

}  // namespace qpass
