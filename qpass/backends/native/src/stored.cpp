// float or uint8 [M, K] x integers [N, K] as they are stored, for few rows: every weight is read once, and that is the time
// it takes.
//
//     y[m, n] = act(sum over groups g of scale[n, g] * sum over k in g of (q[n, k] - zero[n, g]) * x[m, k] + beta[n] + other[m, n])
//
// Two codes of 4 bits and fewer share a byte (even columns in the lower half). Thirty-two codes become bfloat16 in one
// instruction, by a table of sixteen values that holds code - zero, so that nothing is left to correct; codes of 8 bits are
// looked up by halves, 16 * high + low. Both are exact, and sums are float32. A float32 input is the sum of three bfloat16.
// Codes of an input, less their zero point, are bfloat16 numbers as they are; the sums are multiplied by their scale.
// Many rows: `expand` writes the weight out in x's type, and a matrix product of torch's reads that.
#include <algorithm>
#include <vector>

#include "epilogue.h"

namespace qpass {

struct Stored {
  const uint8_t* w;
  const float* scale;
  const uint8_t* zero;  // or null
  const void* x;
  const float* beta;  // or null
  const void* other;
  void* out;
  const float* row_scale;   // of inputs that are codes, else null
  const int32_t* row_zero;
  int64_t m, n, k, group;  // group: K where a row has one scale, else 32 or a multiple of 64
  int32_t whole, is_signed, act, x_type, out_type, other_type, each_row, threads;  // each_row: 1 where every row has a scale, 0 where all have one
};

constexpr int64_t SOME = 16;  // outputs of a task: one vector of the epilogue

inline float value(const Stored& p, int code, int zero) { return static_cast<float>((p.is_signed && !p.whole && code >= 8 ? code - 16 : code) - zero); }

inline void put(const Stored& p, int64_t at, __mmask16 mask, __m512 y) {
  if (p.out_type == BF16) return _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.out) + at, mask, to_bf16(y));
  _mm512_mask_storeu_ps(static_cast<float*>(p.out) + at, mask, y);
}

inline __m512 activated(int act, __m512 y) {
  switch (act) {
    case RELU: return activate<RELU>(y);
    case GELU: return activate<GELU>(y);
    case GELU_TANH: return activate<GELU_TANH>(y);
    case SILU: return activate<SILU>(y);
    default: return y;
  }
}

// sums [M][SOME] of outputs first .. first + SOME
inline void finish_some(const Stored& p, const float* sums, int64_t first) {
  const __mmask16 mask = lanes(p.n - first);
  const __m512 beta = p.beta ? _mm512_maskz_loadu_ps(mask, p.beta + first) : _mm512_setzero_ps();
  for (int64_t m = 0; m < p.m; m++) {
    const int64_t at = m * p.n + first;
    const __m512 factor = _mm512_set1_ps(p.row_scale ? p.row_scale[m * p.each_row] : 1.0f);
    __m512 y = _mm512_fmadd_ps(_mm512_loadu_ps(sums + m * SOME), factor, beta);
    if (p.other) {
      y = _mm512_add_ps(y, p.other_type == BF16 ? from_bf16(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p.other) + at))
                                                 : _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p.other) + at));
    }
    put(p, at, mask, activated(p.act, y));
  }
}

#ifdef __AVX512BF16__

// The input as bfloat16 parts [M * parts][width], width a multiple of 64; of halves even columns come before odd ones in each.
struct Input {
  std::vector<uint16_t> parts;
  int64_t width, count;
};

inline uint16_t rounded(float x) {
  return static_cast<uint16_t>(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0));
}

inline float real(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline __m512i to_bf16_pairs(__m512i code) {  // 32 whole numbers of 16 bits
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(code)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(code, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// the first `count` of 32 lanes
inline __mmask32 some(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

// a row of codes less their zero point; 0 behind its end, where the codes of the weight are not
void row_of_codes(const Stored& p, const uint8_t* x, int zero, int64_t width, uint16_t* to) {
  const __m512i z = _mm512_set1_epi16(static_cast<short>(zero));
  for (int64_t k = 0; k < p.k; k += 64) {
    const int64_t left = p.k - k;
    const __m512i raw = _mm512_maskz_loadu_epi8(left >= 64 ? ~0ull : (1ull << left) - 1, x + k);
    __m512i first = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(raw)), second = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(raw, 1));
    if (!p.whole) first = _mm512_and_si512(raw, _mm512_set1_epi16(255)), second = _mm512_srli_epi16(raw, 8);
    const __mmask32 ones = p.whole ? some(left) : some((left + 1) / 2), others = p.whole ? some(left - 32) : some(left / 2);
    _mm512_storeu_si512(to + (p.whole ? k : k / 2), to_bf16_pairs(_mm512_maskz_sub_epi16(ones, first, z)));
    _mm512_storeu_si512(to + (p.whole ? k + 32 : width / 2 + k / 2), to_bf16_pairs(_mm512_maskz_sub_epi16(others, second, z)));
  }
}

Input input_of(const Stored& p) {
  Input in;
  in.width = (p.k + 63) / 64 * 64;
  in.count = p.x_type == F32 ? 3 : 1;
  in.parts.assign(p.m * in.count * in.width, 0);
  if (p.x_type == U8) {
    for (int64_t m = 0; m < p.m; m++)
      row_of_codes(p, static_cast<const uint8_t*>(p.x) + m * p.k, p.row_zero[m * p.each_row], in.width, in.parts.data() + m * in.width);
    return in;
  }
  for (int64_t m = 0; m < p.m; m++) {
    if (p.x_type == BF16 && p.whole) {
      std::memcpy(in.parts.data() + m * in.width, static_cast<const uint16_t*>(p.x) + m * p.k, 2 * p.k);
      continue;
    }
    int64_t done = 0;
    if (p.x_type == BF16)
      for (; done + 32 <= p.k; done += 32) {  // pairs of columns are one dword
        const __m512i both = _mm512_loadu_si512(static_cast<const uint16_t*>(p.x) + m * p.k + done);
        uint16_t* to = in.parts.data() + m * in.width + done / 2;
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(both));
        _mm256_storeu_si256((__m256i*)(to + in.width / 2), _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
      }
    for (int64_t k = done; k < p.k; k++) {
      const int64_t place = p.whole ? k : (k % 2) * (in.width / 2) + k / 2;
      uint16_t* to = in.parts.data() + m * in.count * in.width + place;
      if (p.x_type == BF16) {
        *to = static_cast<const uint16_t*>(p.x)[m * p.k + k];
        continue;
      }
      float left = static_cast<const float*>(p.x)[m * p.k + k];
      for (int64_t i = 0; i < in.count; i++, to += in.width) {
        *to = rounded(left);
        left -= real(*to);
      }
    }
  }
  return in;
}

inline __m512 dot(__m512 sum, __m512i a, const uint16_t* b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_loadu_si512(b));
}

struct Tables {
  alignas(64) uint16_t paired[16][32];  // code - zero, for each zero, twice
  alignas(64) uint16_t high[32];        // 16 * the upper half of a signed code of 8 bits
};

Tables tables(const Stored& p) {
  Tables t;
  for (int zero = 0; zero < (p.zero ? 16 : 1); zero++)
    for (int code = 0; code < 32; code++) t.paired[zero][code] = rounded(value(p, code % 16, zero));
  for (int code = 0; code < 32; code++) t.high[code] = rounded(16.0f * (code >= 16 ? code - 32 : code));
  return t;
}

// what one step of 32 bytes of a row adds to the sums of V inputs
template <bool WHOLE, bool PAIRS, int V>
inline __attribute__((always_inline)) void step(__m256i raw, __m512i table, __m512i high_table, const uint16_t* x, int64_t width, __m512* part) {
  const __m512i nibble = _mm512_set1_epi16(15);
  if (WHOLE) {
    const __m512i code = _mm512_cvtepi8_epi16(raw);
    const __m512i low = _mm512_permutexvar_epi16(_mm512_and_si512(code, nibble), table);
    const __m512i high = _mm512_permutexvar_epi16(_mm512_srai_epi16(code, 4), high_table);
    for (int v = 0; v < V; v++) part[v] = dot(dot(part[v], low, x + v * width), high, x + v * width);
    return;
  }
  const __m512i code = _mm512_cvtepu8_epi16(raw);
  __m512i even = PAIRS ? _mm512_and_si512(code, nibble) : code, odd = _mm512_srli_epi16(code, 4);
  if (PAIRS) {
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    even = _mm512_or_si512(even, upper), odd = _mm512_or_si512(odd, upper);
  }
  // without pairs the table is there twice, and its index is taken modulo 32: of the bits above the code only one counts
  even = _mm512_permutexvar_epi16(even, table), odd = _mm512_permutexvar_epi16(odd, table);
  for (int v = 0; v < V; v++) part[v] = dot(dot(part[v], even, x + v * width), odd, x + v * width + width / 2);
}

// V inputs by R outputs: adds to `sums[m][r]` of SOME, from output n on
template <bool WHOLE, bool PAIRS, int R, int V>
void rows_by_inputs(const Stored& p, const Tables& t, const Input& in, int64_t first_input, int64_t n, float* sums) {
  constexpr int64_t STEP = WHOLE ? 32 : 64;
  const int64_t bytes = WHOLE ? p.k : p.k / 2, groups = (p.k + p.group - 1) / p.group, full = bytes / 32;
  const int64_t own = PAIRS ? 1 : groups == 1 ? full + 1 : p.group / STEP;  // steps that share their scales
  const __m512i high_table = _mm512_load_si512(t.high);
  const uint16_t* x = in.parts.data() + first_input * in.width;
  const uint8_t* w = p.w + n * bytes;
  const int64_t ahead = R * bytes;  // the rows that come next
  __m512 total[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) total[r][v] = _mm512_setzero_ps();
  for (int64_t s = 0, g = 0; s * 32 < bytes; g += PAIRS ? 2 : 1) {
    const int64_t end = std::min(full, s + own), g2 = std::min(g + 1, groups - 1);
    __m512i table[R];
    __m512 part[R][V];
    for (int r = 0; r < R; r++) {
      const int64_t at = (n + r) * groups;
      const uint16_t* low = t.paired[p.zero ? p.zero[at + g] : 0];
      table[r] = _mm512_load_si512(low);
      if (PAIRS) table[r] = _mm512_inserti64x4(table[r], _mm256_load_si256((const __m256i*)t.paired[p.zero ? p.zero[at + g2] : 0]), 1);
      for (int v = 0; v < V; v++) part[r][v] = _mm512_setzero_ps();
    }
    for (; s < end; s++)
      for (int r = 0; r < R; r++) {
        _mm_prefetch((const char*)(w + r * bytes + s * 32 + ahead), _MM_HINT_T0);
        step<WHOLE, PAIRS, V>(_mm256_loadu_si256((const __m256i*)(w + r * bytes + s * 32)), table[r], high_table, x + s * 32, in.width, part[r]);
      }
    if (s == full && bytes % 32 && (groups == 1 || PAIRS)) {
      if (!PAIRS || end - s == 0) {
        const __mmask32 mask = (1u << (bytes % 32)) - 1;
        const bool here = !PAIRS || g * p.group >= s * STEP;  // of pairs the last one alone may be half
        if (here) {
          for (int r = 0; r < R; r++)
            step<WHOLE, PAIRS, V>(_mm256_maskz_loadu_epi8(mask, w + r * bytes + s * 32), table[r], high_table, x + s * 32, in.width, part[r]);
          s++;
        }
      }
    }
    for (int r = 0; r < R; r++) {
      const float* scale = p.scale + (n + r) * groups;
      __m512 factor = _mm512_set1_ps(scale[g]);
      if (PAIRS) factor = _mm512_insertf32x8(factor, _mm256_set1_ps(scale[g2]), 1);
      for (int v = 0; v < V; v++) total[r][v] = _mm512_fmadd_ps(part[r][v], factor, total[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[((first_input + v) / in.count) * SOME + r] += _mm512_reduce_add_ps(total[r][v]);
}

template <bool WHOLE, bool PAIRS, int R>
void outputs(const Stored& p, const Tables& t, const Input& in, int64_t n, float* sums) {
  const int64_t count = p.m * in.count;
  int64_t v = 0;
  for (; v + 3 <= count; v += 3) rows_by_inputs<WHOLE, PAIRS, R, 3>(p, t, in, v, n, sums);
  if (count - v == 2) rows_by_inputs<WHOLE, PAIRS, R, 2>(p, t, in, v, n, sums);
  if (count - v == 1) rows_by_inputs<WHOLE, PAIRS, R, 1>(p, t, in, v, n, sums);
}

template <bool WHOLE, bool PAIRS>
void some_outputs(const Stored& p, const Tables& t, const Input& in, int64_t first, int64_t end, float* sums) {
  int64_t n = first;
  for (; n + 4 <= end; n += 4) outputs<WHOLE, PAIRS, 4>(p, t, in, n, sums + (n - first));
  for (; n < end; n++) outputs<WHOLE, PAIRS, 1>(p, t, in, n, sums + (n - first));
}

#endif

// sixteen codes from k on of one row
inline __m512 codes_at(const Stored& p, int64_t n, int64_t k, __mmask16 mask) {
  if (p.whole) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p.w + n * p.k + k)));
  const __m128i raw = _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask & 0xFF), p.w + n * (p.k / 2) + k / 2);
  const __m128i low = _mm_and_si128(raw, _mm_set1_epi8(15)), high = _mm_and_si128(_mm_srli_epi16(raw, 4), _mm_set1_epi8(15));
  __m512i code = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
  if (p.is_signed) code = _mm512_sub_epi32(_mm512_xor_si512(code, _mm512_set1_epi32(8)), _mm512_set1_epi32(8));
  return _mm512_cvtepi32_ps(code);
}

void expand_row(const Stored& p, int64_t n) {
  const int64_t groups = (p.k + p.group - 1) / p.group;
  for (int64_t g = 0; g < groups; g++) {
    const __m512 scale = _mm512_set1_ps(p.scale[n * groups + g]), zero = _mm512_set1_ps(p.zero ? p.zero[n * groups + g] : 0);
    const int64_t end = std::min(p.k, (g + 1) * p.group);
    for (int64_t k = g * p.group; k < end; k += 16) {
      __mmask16 mask = lanes(end - k);
      // of halves a byte is two columns; the mask of bytes is wide enough for the last of them
      const __m512 y = _mm512_mul_ps(_mm512_sub_ps(codes_at(p, n, k, p.whole ? mask : lanes((end - k + 1) / 2)), zero), scale);
      put(p, n * p.k + k, mask, y);
    }
  }
}

}  // namespace qpass

extern "C" {

#ifdef __AVX512BF16__
void qpass_stored(const qpass::Stored* args) {
  using namespace qpass;
  const Stored& p = *args;
  if (p.m == 0 || p.n == 0) return;
  const Input in = input_of(p);
  const Tables t = tables(p);
  const auto run = p.whole ? some_outputs<true, false> : p.group == 32 && p.k > 32 ? some_outputs<false, true> : some_outputs<false, false>;
  const int64_t tasks = (p.n + SOME - 1) / SOME;
#pragma omp parallel num_threads(p.threads) if (p.m * p.n * p.k > (1 << 17))
  {
    std::vector<float> sums(p.m * SOME);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t first = task * SOME, end = std::min(p.n, first + SOME);
      std::fill(sums.begin(), sums.end(), 0.0f);
      run(p, t, in, first, end, sums.data());
      finish_some(p, sums.data(), first);
    }
  }
}
#endif

// the weight itself, [N, K] in out_type
void qpass_expand(const qpass::Stored* args) {
  const qpass::Stored& p = *args;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.n * p.k > (1 << 16))
  for (int64_t n = 0; n < p.n; n++) qpass::expand_row(p, n);
}
}
