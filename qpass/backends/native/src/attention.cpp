// Attention in bfloat16, one pass over the keys for six queries at a time:
//
//     s = q k^T * scale + mask;   p = exp(s - max s);   out = p v / sum p
//
// A task is one head and a block of its queries. It lays the keys and values out for the product instruction once; scores and
// weights of six queries stay in the L1 cache. Results are bf16, or u8 = clamp(round(out * mul[c]) + add[c]) when they are only
// read as integers (c counts the columns of all heads). A query that sees no key gets 0, as in torch's safe softmax.
#ifdef __AVX512BF16__
#include <vector>

#include "tile.h"

namespace qpass {

enum Mask { NO_MASK = 0, BOOL = 1, FLOAT = 2, HALF = 3 };

struct Attention {
  const uint16_t *q, *k, *v;
  const void* mask;
  void* out;
  const float *mul, *add;
  int64_t batch, heads, kv_heads, queries, keys, width, out_width;
  int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[3], out_stride[3];  // batch, head, row; in elements
  int32_t mask_type, causal, to_u8, threads;
  float scale;
};

struct Scratch {
  std::vector<int32_t> k, v;
  std::vector<float> scores, mixed;
  std::vector<uint16_t> weights;
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// [keys, width] -> [width / 2][padded keys] pairs
void pack_keys(const uint16_t* k, int64_t stride, int64_t keys, int64_t width, int32_t* out, int64_t ld) {
  const __m512i rows = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(static_cast<int>(stride * 2)));
  for (int64_t n = 0; n < ld; n += 16) {
    const __mmask16 mask = n < keys ? lanes(keys - n) : 0;
    for (int64_t i = 0; i < width / 2; i++) {
      const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, rows, k + n * stride + 2 * i, 1);
      _mm512_storeu_si512(out + i * ld + n, pairs);
    }
  }
}

// [keys, width] -> [padded keys / 2][padded width] pairs of neighbouring keys
void pack_values(const uint16_t* v, int64_t stride, int64_t keys, int64_t width, int32_t* out, int64_t ld, int64_t padded) {
  for (int64_t n = 0; n < padded; n += 2)
    for (int64_t c = 0; c < ld; c += 16) {
      const __mmask16 mask = c < width ? lanes(width - c) : 0;
      const __mmask16 first = n < keys ? mask : 0, second = n + 1 < keys ? mask : 0;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, v + n * stride + c));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, v + (n + 1) * stride + c));
      _mm512_storeu_si512(out + n / 2 * ld + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

constexpr float LOG2E = 1.44269504f;

// Which of sixteen keys are seen: those before the limit, and of these the ones a bool mask leaves.
inline __mmask16 seen(const Attention& p, const void* row, int64_t n, int64_t limit) {
  const __mmask16 live = lanes(limit - n);
  if (p.mask_type != BOOL) return live;
  const __m128i flags = _mm_maskz_loadu_epi8(live, static_cast<const uint8_t*>(row) + n);
  return _mm_test_epi8_mask(flags, flags);
}

// s += mask / scale, so that the scale is applied once
void add_bias(const Attention& p, const void* row, int64_t limit, float* s) {
  const __m512 inverse = _mm512_set1_ps(1 / p.scale);
  for (int64_t n = 0; n < limit; n += 16) {
    const __mmask16 live = lanes(limit - n);
    const __m512 bias = p.mask_type == FLOAT
                            ? _mm512_maskz_loadu_ps(live, static_cast<const float*>(row) + n)
                            : from_bf16(_mm256_maskz_loadu_epi16(live, static_cast<const uint16_t*>(row) + n));
    _mm512_storeu_ps(s + n, _mm512_fmadd_ps(bias, inverse, _mm512_loadu_ps(s + n)));
  }
}

// Scores of one query -> weights in bf16, zero for keys that are not seen and beyond the last; returns 1 / their sum.
float softmax(const Attention& p, const void* mask_row, int64_t limit, int64_t padded, float* s, uint16_t* out) {
  if (p.mask_type == FLOAT || p.mask_type == HALF) add_bias(p, mask_row, limit, s);
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int64_t n = 0; n < limit; n += 16) top = _mm512_mask_max_ps(top, seen(p, mask_row, n, limit), _mm512_loadu_ps(s + n), top);
  const float highest = _mm512_reduce_max_ps(top);
  const bool none = highest == -INFINITY;
  const __m512 scale = _mm512_set1_ps(p.scale * LOG2E), lowest = _mm512_set1_ps(-200.0f);
  const __m512 shift = _mm512_set1_ps(none ? 0.0f : highest * p.scale * LOG2E);
  __m512 total = _mm512_setzero_ps();
  int64_t n = 0;
  for (; n < limit; n += 16) {
    const __m512 x = _mm512_max_ps(lowest, _mm512_fmsub_ps(_mm512_loadu_ps(s + n), scale, shift));  // a NaN goes through
    const __m512 e = _mm512_maskz_mov_ps(seen(p, mask_row, n, limit), exp2_short(x));
    total = _mm512_add_ps(total, e);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + n), to_bf16(e));
  }
  for (; n < padded; n += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + n), _mm256_setzero_si256());
  return none ? 0.0f : 1.0f / _mm512_reduce_add_ps(total);
}

void store(const Attention& p, const float* mixed, float inverse, int64_t head, int64_t at) {
  for (int64_t c = 0; c < p.out_width; c += 16) {
    const __mmask16 mask = lanes(p.out_width - c);
    const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, mixed + c), _mm512_set1_ps(inverse));
    if (!p.to_u8) {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.out) + at + c, mask, to_bf16(y));
      continue;
    }
    const int64_t column = head * p.out_width + c;
    const __m512 mul = _mm512_maskz_loadu_ps(mask, p.mul + column), add = _mm512_maskz_loadu_ps(mask, p.add + column);
    _mm_mask_storeu_epi8(static_cast<uint8_t*>(p.out) + at + c, mask, to_u8(_mm512_fmadd_ps(y, mul, add)));
  }
}

template <class Op>
void panels(const Operands& base, int64_t columns, int rows) {
  for (int64_t c = 0; c < columns; c += COLUMNS) {
    Operands p = base;
    p.b += c;
    p.out = static_cast<float*>(p.out) + c;
    product<Op>(p, rows, static_cast<int>(std::min<int64_t>(WIDE, (columns - c + 15) / 16)));
  }
}

void attend(const Attention& p, int64_t b, int64_t h, int64_t first, int64_t last, Scratch& t) {
  const int64_t padded = round_up(p.keys, 16), wide = round_up(p.out_width, 16), kv = h * p.kv_heads / p.heads;
  t.k.resize(p.width / 2 * padded);
  t.v.resize(padded / 2 * wide);
  t.scores.resize(ROWS * padded);
  t.mixed.resize(ROWS * wide);
  t.weights.resize(ROWS * padded);
  const int64_t seen = p.causal ? std::min(p.keys, last) : p.keys;
  pack_keys(p.k + b * p.k_stride[0] + kv * p.k_stride[1], p.k_stride[2], seen, p.width, t.k.data(), padded);
  pack_values(p.v + b * p.v_stride[0] + kv * p.v_stride[1], p.v_stride[2], seen, p.out_width, t.v.data(), wide, padded);
  const int size = p.mask_type == BOOL ? 1 : p.mask_type == FLOAT ? 4 : 2;
  for (int64_t i = first; i < last; i += ROWS) {
    const int rows = static_cast<int>(std::min<int64_t>(ROWS, last - i));
    const int64_t reach = p.causal ? std::min(p.keys, i + rows) : p.keys, columns = round_up(reach, 16);
    const uint16_t* q = p.q + b * p.q_stride[0] + h * p.q_stride[1] + i * p.q_stride[2];
    panels<Halves>({reinterpret_cast<const uint8_t*>(q), 2 * p.q_stride[2], t.k.data(), padded, p.width / 2, 0,
                    t.scores.data(), padded}, columns, rows);
    float inverse[ROWS];
    for (int r = 0; r < rows; r++) {
      const int64_t at = b * p.mask_stride[0] + h * p.mask_stride[1] + (i + r) * p.mask_stride[2];
      const void* mask = static_cast<const uint8_t*>(p.mask) + at * size;
      const int64_t limit = p.causal ? std::min(p.keys, i + r + 1) : p.keys;
      inverse[r] = softmax(p, mask, limit, columns, t.scores.data() + r * padded, t.weights.data() + r * padded);
    }
    panels<Halves>({reinterpret_cast<const uint8_t*>(t.weights.data()), 2 * padded, t.v.data(), wide, columns / 2, 0,
                    t.mixed.data(), wide}, wide, rows);
    for (int r = 0; r < rows; r++)
      store(p, t.mixed.data() + r * wide, inverse[r], h,
            b * p.out_stride[0] + h * p.out_stride[1] + (i + r) * p.out_stride[2]);
  }
}

}  // namespace qpass

extern "C" void qpass_attention(const qpass::Attention* args) {
  const qpass::Attention& p = *args;
  if (p.batch * p.heads * p.queries == 0) return;
  const int64_t heads = p.batch * p.heads;
  const int64_t most = std::max<int64_t>(1, p.queries / 32), wanted = (3 * p.threads + heads - 1) / heads;
  const int64_t blocks = std::clamp<int64_t>(heads >= 4 * p.threads ? 1 : wanted, 1, most);
  const bool parallel = p.threads > 1 && heads * p.queries * p.keys * p.width > (1 << 17);
#pragma omp parallel num_threads(p.threads) if (parallel)
  {
    static thread_local qpass::Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < heads * blocks; task++) {
      const int64_t head = task / blocks, block = task % blocks;
      qpass::attend(p, head / p.heads, head % p.heads, block * p.queries / blocks, (block + 1) * p.queries / blocks, scratch);
    }
  }
}
#endif
