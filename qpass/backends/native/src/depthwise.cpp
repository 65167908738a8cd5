// Depthwise u8 x s8 convolutions: 64 channels of a pixel at a time, the taps of each channel side by side (conv.h).
//
// Four taps a, b, c, d of 64 channels are interleaved to a0 b0 c0 d0 a1 b1 ..., which the product instruction sums to one lane a
// channel. Unpacking works in the quarters of a register, so vector j holds the channels 16 q + 4 j + 0 .. 3 of the quarters
// q = 0 .. 3. Weights lie in that order: [C / 64][taps / 4][4 vectors][16 lanes][4 taps]; taps that fill up have weight 0. Of 3 x 3 taps each
// column is filled up, so that it serves the next pixel too.
#include <algorithm>

#include "conv_codes.h"
#include "tile.h"

namespace qpass {

// whether four taps are a column of three and a zero
inline bool by_columns(const Conv& p) { return p.kernel[0] * p.kernel[1] == 3 && p.kernel[2] == 3; }

struct Block {
  const int8_t* w;
  int64_t c;       // first channel
  __mmask64 mask;  // channels
  __m512i start[4];
  __m512 alpha[4], beta[4];
};

// vectors in the order of the channels -> in that of the unpacked ones, and back: the quarters as a matrix, transposed
inline void turn(__m512i (&v)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xEE);
  const __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
  v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
  v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
}

void load_turned(const void* from, __mmask64 mask, __m512i (&v)[4]) {
  for (int j = 0; j < 4; j++)
    v[j] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask >> 16 * j), static_cast<const int32_t*>(from) + 16 * j);
  turn(v);
}

inline void interleaved(__m512i a, __m512i b, __m512i c, __m512i d, __m512i (&x)[4]) {
  const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  x[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
  x[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
  x[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
  x[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
}

template <bool FULL>
inline __m512i load_codes(const uint8_t* from, const Block& block) {
  return FULL ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(block.mask, from);
}

// Stores the sums of pixel m. QUICK: codes of one zero point, with nothing added.
template <bool QUICK, bool FULL>
__attribute__((always_inline)) inline void store_sums(const Conv& p, const Chunk& chunk, const Block& block, int64_t m,
                                                      __m512i (&sum)[4]) {
  const int32_t* sample = chunk.sample.data() + m;
  const int64_t to = chunk.at[m] * p.n + block.c;
  if (!QUICK && !p.clamped) {
    alignas(64) int32_t sums[64];
    turn(sum);
    for (int j = 0; j < 4; j++) _mm512_store_si512(sums + 16 * j, sum[j]);
    return finish(p, sums, 64, chunk.at.data() + m, sample, 1, block.c, std::min<int64_t>(64, p.n - block.c));
  }
  __m512i other[4], zero = _mm512_setzero_si512();
  if (!QUICK && p.other)
    interleaved(load_codes<FULL>(static_cast<const uint8_t*>(p.other) + to, block), zero, zero, zero, other);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512 y = _mm512_cvtepi32_ps(sum[j]);
    if (!QUICK && p.sample_scale) y = _mm512_mul_ps(y, _mm512_set1_ps(p.sample_scale[*sample]));
    y = _mm512_fmadd_ps(y, block.alpha[j], block.beta[j]);
    if (!QUICK && p.other) y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(other[j]), _mm512_set1_ps(p.other_scale), y);
    sum[j] = to_codes(y);
  }
  const __m512i low = _mm512_packs_epi32(sum[0], sum[1]), high = _mm512_packs_epi32(sum[2], sum[3]);
  const __m512i codes = clamp_codes(p, _mm512_packus_epi16(low, high));
  uint8_t* out = static_cast<uint8_t*>(p.out) + to;
  if (FULL)
    _mm512_storeu_si512(out, codes);
  else
    _mm512_mask_storeu_epi8(out, block.mask, codes);
}

template <bool QUICK>
inline void start_sums(const Conv& p, const Chunk& chunk, const Block& block, int64_t m, __m512i (&sum)[4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    sum[j] = block.start[j];
    if (!QUICK && p.sample_zero)
      sum[j] = _mm512_mullo_epi32(sum[j], _mm512_set1_epi32(p.sample_zero[chunk.sample[m]]));
  }
}

// any taps
template <bool QUICK, bool FULL>
void each_pixel(const Conv& p, const Plan& plan, const Chunk& chunk, const Block& block) {
  const int64_t taps = static_cast<int64_t>(plan.taps.size()), count = static_cast<int64_t>(chunk.at.size());
  for (int64_t m = 0; m < count; m++) {
    __m512i sum[4], x[4];
    start_sums<QUICK>(p, chunk, block, m, sum);
    const int8_t* w = block.w;
    for (int64_t tap = 0; tap < taps; tap += 4, w += 256) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        x[i] = load_codes<FULL>(chunk.rows[std::min(tap + i, taps - 1) * chunk.ld + m] + block.c, block);
      interleaved(x[0], x[1], x[2], x[3], x);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) Bytes::dot(sum[j], x[j], _mm512_loadu_si512(w + 64 * j));
    }
    store_sums<QUICK, FULL>(p, chunk, block, m, sum);
  }
}

// 3 x 3 taps, of which four hold a column. The next pixel of a line has all but SHIFT columns in common with this one.
template <bool QUICK, bool FULL, int SHIFT>
void each_line(const Conv& p, const Plan& plan, const Chunk& chunk, const Block& block) {
  const int64_t count = static_cast<int64_t>(chunk.at.size()), width = plan.axes[2].count;
  __m512i x[3][4];
  for (int64_t m = 0, w = chunk.first % width; m < count; m++, w = w + 1 == width ? 0 : w + 1) {
    const uint8_t* const* rows = chunk.rows.data() + m;
    const auto column = [&](int c) __attribute__((always_inline)) {
      const __m512i a = load_codes<FULL>(rows[c * chunk.ld] + block.c, block);
      const __m512i b = load_codes<FULL>(rows[(3 + c) * chunk.ld] + block.c, block);
      const __m512i d = load_codes<FULL>(rows[(6 + c) * chunk.ld] + block.c, block);
      interleaved(a, b, d, _mm512_setzero_si512(), x[c]);
    };
#pragma GCC unroll 3
    for (int c = 0; c < 3 - SHIFT; c++) {
      if (m == 0 || w == 0)
        column(c);
      else
        for (int j = 0; j < 4; j++) x[c][j] = x[c + SHIFT][j];
    }
#pragma GCC unroll 3
    for (int c = 3 - SHIFT; c < 3; c++) column(c);
    __m512i sum[4];
    start_sums<QUICK>(p, chunk, block, m, sum);
#pragma GCC unroll 3
    for (int c = 0; c < 3; c++) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) Bytes::dot(sum[j], x[c][j], _mm512_loadu_si512(block.w + 256 * c + 64 * j));
    }
    store_sums<QUICK, FULL>(p, chunk, block, m, sum);
  }
}

template <bool QUICK, bool FULL>
void run(const Conv& p, const Plan& plan, const Chunk& chunk, const Block& block) {
  if (!by_columns(p)) return each_pixel<QUICK, FULL>(p, plan, chunk, block);
  const int64_t step = p.transposed ? 3 : p.stride[2], dilation = p.dilation[2];
  if (step == dilation) return each_line<QUICK, FULL, 1>(p, plan, chunk, block);
  if (step == 2 * dilation) return each_line<QUICK, FULL, 2>(p, plan, chunk, block);
  each_line<QUICK, FULL, 3>(p, plan, chunk, block);
}

void pixels(const Conv& p, const Plan& plan, const Chunk& chunk) {
  const int64_t taps = by_columns(p) ? 12 : (static_cast<int64_t>(plan.taps.size()) + 3) / 4 * 4;
  const bool quick = p.clamped && !p.sample_scale && !p.other;
  for (int64_t c = 0; c < p.n; c += 64) {
    Block block;
    block.w = p.w + c * taps;
    block.c = c;
    block.mask = p.n - c >= 64 ? ~0ull : (1ull << (p.n - c)) - 1;
    load_turned(plan.offset + c, block.mask, block.start);
    load_turned(p.alpha + c, block.mask, reinterpret_cast<__m512i(&)[4]>(block.alpha));
    load_turned(p.beta + c, block.mask, reinterpret_cast<__m512i(&)[4]>(block.beta));
    for (int j = 0; j < 4; j++) block.start[j] = _mm512_sub_epi32(_mm512_setzero_si512(), block.start[j]);
    if (p.n - c >= 64)
      quick ? run<true, true>(p, plan, chunk, block) : run<false, true>(p, plan, chunk, block);
    else
      quick ? run<true, false>(p, plan, chunk, block) : run<false, false>(p, plan, chunk, block);
  }
}

}  // namespace qpass

extern "C" void qpass_depthwise(const qpass::Conv* args) {
  const qpass::Conv& p = *args;
  std::vector<uint8_t> held, zeros;
  if (p.batch == 0 || p.n == 0) return;
  qpass::Plan plan = rows_of(p, held, zeros);
  const int64_t all[] = {-1, -1, -1};
  qpass::set_axes(p, plan, all);
  plan.offset = p.offset;
  const int64_t count = plan.pixels(p);
  if (count == 0) return;
  const int64_t chunk = std::clamp<int64_t>(count / (4 * p.threads), 8, 64), chunks = (count + chunk - 1) / chunk;
  const bool parallel = p.threads > 1 && count * p.n * static_cast<int64_t>(plan.taps.size()) > (1 << 17);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads) if (parallel)
  for (int64_t task = 0; task < chunks; task++) {
    static thread_local qpass::Chunk at;
    qpass::locate(p, plan, task * chunk, std::min(chunk, count - task * chunk), at);
    qpass::pixels(p, plan, at);
  }
}
