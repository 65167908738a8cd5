// u8 [M, K] x s8 [N, K] -> [M, N]: AVX-512 VNNI, with everything that follows the product done before it is stored.
//
//     y[m, n] = act((acc[m, n] - row_zero[m] * offset[n]) * alpha[n] * row_scale[m] + beta[n] + other[m, n])
//
// stored as f32, bf16, or u8 = clamp(round(y * out_inverse) + out_zero). Up to the conversion of the sum to f32 all is exact.
// Without row scales row_scale is 1 and the offset already holds the zero point: acc - offset.
// Weight-only: x is f32, weights lie as [N / 64][K][64] and are made f32 a panel at a time, for all rows of a task; then
// y = act(acc * alpha + beta + other).
//
// Weights lie as [N / 64][K / 4][64][4]: four zmm of sixteen columns for each group of four inputs. A tile is 6 rows by 64
// columns (tile.h). A task is a chunk of rows by some panels of 64 columns, whose weights stay in the L2 cache.
#include <vector>

#include "epilogue.h"
#include "tile.h"

namespace qpass {

constexpr int64_t CHUNK = 48;

struct Linear {
  const uint8_t* x;  // f32 where float_input
  const int8_t* w;
  const float *alpha, *beta, *row_scale;
  const int32_t *offset, *row_zero;
  const void* other;
  void* out;
  int64_t m, n, k, ldx, ld_other, ld_out;
  int32_t act, out_type, other_type, float_input, threads;
  float out_inverse, out_zero;
};

inline __m512 load(const void* base, int type, int64_t at, __mmask16 mask) {
  if (type == BF16) return from_bf16(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(base) + at));
  return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(base) + at);
}

inline void store(const Linear& p, int64_t at, __mmask16 mask, __m512 y) {
  if (p.out_type == F32) return _mm512_mask_storeu_ps(static_cast<float*>(p.out) + at, mask, y);
  if (p.out_type == BF16) return _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.out) + at, mask, to_bf16(y));
  const __m512 scaled = _mm512_min_ps(_mm512_mul_ps(y, _mm512_set1_ps(p.out_inverse)), _mm512_set1_ps(1e6f));
  const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(static_cast<int>(p.out_zero)));
  const __m128i codes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(q, _mm512_setzero_si512()));
  _mm_mask_storeu_epi8(static_cast<uint8_t*>(p.out) + at, mask, codes);
}

template <int ACT>
void finish(const Linear& p, const int32_t* sums, int64_t row, int rows, int64_t column) {
  for (int64_t v = 0; v < COLUMNS && column + v < p.n; v += 16) {
    const int64_t n = column + v;
    const __mmask16 mask = lanes(p.n - n);
    const __m512 alpha = _mm512_maskz_loadu_ps(mask, p.alpha + n), beta = _mm512_maskz_loadu_ps(mask, p.beta + n);
    const __m512i offset = _mm512_maskz_loadu_epi32(p.float_input ? 0 : mask, p.offset + n);
    for (int r = 0; r < rows; r++) {
      const int64_t m = row + r;
      const __m512i sum = _mm512_loadu_si512(sums + r * COLUMNS + v);
      __m512 y;
      if (p.float_input) {
        y = _mm512_fmadd_ps(_mm512_castsi512_ps(sum), alpha, beta);
      } else if (p.row_scale) {
        const __m512i shifted = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(p.row_zero[m]), offset));
        y = _mm512_mul_ps(_mm512_cvtepi32_ps(shifted), alpha);
        y = _mm512_fmadd_ps(y, _mm512_set1_ps(p.row_scale[m]), beta);
      } else {
        y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offset)), alpha, beta);
      }
      if (p.other) y = _mm512_add_ps(y, load(p.other, p.other_type, m * p.ld_other + n, mask));
      store(p, m * p.ld_out + n, mask, activate<ACT>(y));
    }
  }
}

using Finish = void (*)(const Linear&, const int32_t*, int64_t, int, int64_t);
constexpr Finish FINISH[] = {finish<NONE>, finish<RELU>, finish<GELU>, finish<GELU_TANH>, finish<SILU>, finish<GELU_SHORT>};

constexpr float WIDE_STEP = 2e-3f;  // output steps from which on GELU_SHORT errs by at most a seventh of one

// int8 [K][64] -> f32
void to_floats(const int8_t* w, int64_t k, std::vector<float>& out) {
  out.resize(k * COLUMNS);
  for (int64_t i = 0; i < k * COLUMNS; i += 16) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i)));
    _mm512_storeu_ps(out.data() + i, _mm512_cvtepi32_ps(wide));
  }
}

void run(const Linear& p, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
  static thread_local std::vector<float> floats;
  alignas(64) int32_t sums[ROWS * COLUMNS];
  const int64_t width = p.float_input ? 4 : 1, groups = p.float_input ? p.k : p.k / 4, lda = p.ldx * width;
  const int64_t panel_bytes = (p.float_input ? p.k : (p.k + 3) / 4 * 4) * COLUMNS;
  const int rest = p.float_input ? 0 : static_cast<int>(p.k % 4);
  for (int64_t j = panel; j < panel_end; j++) {
    const int8_t* packed = p.w + j * panel_bytes;
    if (p.float_input) to_floats(packed, p.k, floats);
    const void* w = p.float_input ? static_cast<const void*>(floats.data()) : packed;
    const int vectors = static_cast<int>(std::min<int64_t>(WIDE, (p.n - j * COLUMNS + 15) / 16));
    for (int64_t m = row; m < row_end; m += ROWS) {
      const int rows = static_cast<int>(std::min<int64_t>(ROWS, row_end - m));
      const Operands tile{p.x + m * lda, lda, static_cast<const int32_t*>(w), COLUMNS, groups, rest, sums, COLUMNS};
      if (p.float_input)
        product<Floats>(tile, rows, vectors);
      else
        product<Bytes>(tile, rows, vectors);
      FINISH[p.act](p, sums, m, rows, j * COLUMNS);
    }
  }
}

}  // namespace qpass

extern "C" {

// int8 [N, K] row-major -> [ceil(N / 64)][ceil(K / 4)][64][4], zero padded
void qpass_pack_weight(const int8_t* weight, int8_t* packed, int64_t n, int64_t k) {
  const int64_t groups = (k + 3) / 4;
  for (int64_t row = 0; row < n; row++)
    for (int64_t column = 0; column < k; column++)
      packed[((row / 64 * groups + column / 4) * 64 + row % 64) * 4 + column % 4] = weight[row * k + column];
}

void qpass_linear(const qpass::Linear* args) {
  qpass::Linear p = *args;
  if (p.act == qpass::GELU && p.out_type == qpass::U8 && p.out_inverse * qpass::WIDE_STEP < 1) p.act = qpass::GELU_SHORT;
  if (p.m == 0 || p.n == 0) return;
  const int64_t panels = (p.n + qpass::COLUMNS - 1) / qpass::COLUMNS;
  const int64_t wanted = 3 * p.threads;
  int64_t chunk = qpass::CHUNK;
  while (chunk > 2 * qpass::ROWS && (p.m + chunk - 1) / chunk * panels < wanted) chunk -= qpass::ROWS;
  const int64_t chunks = (p.m + chunk - 1) / chunk;
  const int64_t splits = std::clamp<int64_t>((wanted + chunks - 1) / chunks, 1, panels);
  const bool parallel = p.threads > 1 && p.m * p.n * p.k > (1 << 18);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads) if (parallel)
  for (int64_t task = 0; task < chunks * splits; task++) {
    const int64_t c = task / splits, s = task % splits;
    qpass::run(p, c * chunk, std::min(p.m, (c + 1) * chunk), s * panels / splits, (s + 1) * panels / splits);
  }
}
}
