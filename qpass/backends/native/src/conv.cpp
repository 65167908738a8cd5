// Convolution of u8 images, channels last, with s8 weights: implicit matrix product through tables of row pointers.
//
//     sum[pixel, n] = sum over taps and channels of x[pixel moved by tap, c] * w[n, tap, c]  -  zero * offset[n]
//
// A task is a chunk of output pixels by some panels of 64 output channels. It first writes down, for each tap, where the channels of each
// of its pixels lie: in the image, or in a row of zero points where the tap falls outside. Then 6 pixels by 64 channels of sums stay in
// registers over all taps (tile.h explains the product). Weights lie as [group][N / 64][tap][C / 4][64][4]; a panel stays in the L2 cache.
// With few channels the kernel's width and channels are read as one run of bytes from a copy that is padded with zero points.
// A transposed convolution goes by phase: the output pixels that see the same taps.
// Depthwise: four taps of 64 channels are interleaved, so that one product takes four taps of sixteen channels.
#include <algorithm>
#include <vector>

#include "epilogue.h"
#include "tile.h"

namespace qpass {

constexpr int64_t PIXELS = 48;
constexpr int64_t SLACK = 64;

struct Conv {
  const uint8_t* x;
  const int8_t* w;
  const float *alpha, *beta, *slope, *sample_scale;
  const int32_t *offset, *sample_zero;
  const void* other;
  void* out;
  int64_t batch, channels, n, groups, ld;  // ld: bytes from a pixel to the next, where the image is some channels of a wider one
  int64_t in[3], size[3], kernel[3], stride[3], padding[3], dilation[3];
  int32_t transposed, x_zero, act, out_type, other_type, direct, threads, fold;
  float other_scale, other_zero, low, high, out_inverse, out_zero, out_max;
};

struct Tap {
  int64_t index, at[3];  // place in the packed weight; kernel position
};

struct Phase {
  int64_t first[3], step[3], count[3], pixels;  // output positions first + step * i, i < count, of each axis
  std::vector<Tap> taps;
  const int32_t* offset;
};

struct Task {
  std::vector<const uint8_t*> rows;  // [tap][pixel]
  std::vector<int64_t> out;          // row of the output of each pixel
  std::vector<int64_t> image;        // which image
};

template <int R, int V>
void conv_tile(const uint8_t* const* rows, int64_t ld, int64_t taps, int64_t channel, int64_t groups, int rest, const int32_t* b, const int32_t* start, const char* ahead, int32_t* out) {
  __m512i sum[R][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const __m512i first = _mm512_loadu_si512(start + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) sum[r][v] = first;
  }
  for (int64_t t = 0; t < taps; t++) {
    const uint8_t* a[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) a[r] = rows[t * ld + r] + channel;
    for (int64_t g = 0; g < groups; g++, b += COLUMNS, ahead += 64) {
      _mm_prefetch(ahead, _MM_HINT_T1);
      int32_t four[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) std::memcpy(&four[r], a[r] + 4 * g, 4);
      step<Bytes, R, V>(sum, four, b);
    }
    if (rest) {
      int32_t four[R] = {};
      for (int r = 0; r < R; r++) std::memcpy(&four[r], a[r] + 4 * groups, rest);
      step<Bytes, R, V>(sum, four, b);
      b += COLUMNS;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) _mm512_storeu_si512(out + r * COLUMNS + 16 * v, sum[r][v]);
  }
}

using ConvTile = void (*)(const uint8_t* const*, int64_t, int64_t, int64_t, int64_t, int, const int32_t*, const int32_t*, const char*, int32_t*);

template <int... I>
inline ConvTile conv_choose(int at, std::integer_sequence<int, I...>) {
  static constexpr ConvTile TILES[] = {conv_tile<I / WIDE + 1, I % WIDE + 1>...};
  return TILES[at];
}

inline Epilogue epilogue(const Conv& p) {
  return {p.alpha,  p.beta,        p.slope,      p.other, p.out,  p.n,           p.act,      p.out_type, p.other_type,
          p.direct, p.other_scale, p.other_zero, p.low,   p.high, p.out_inverse, p.out_zero, p.out_max};
}

// where a tap of the output position `out` on one axis lies in the image; an exact division within a phase
inline int64_t locate(const Conv& p, int axis, int64_t out, const Tap& tap) {
  if (p.transposed) return (out + p.padding[axis] - tap.at[axis] * p.dilation[axis]) / p.stride[axis];
  return out * p.stride[axis] - p.padding[axis] + tap.at[axis] * p.dilation[axis];
}

// a run of pixels i .. i + run - 1 of one output line: their rows for each tap
inline void write_run(const Conv& p, const Phase& phase, const uint8_t* image, const uint8_t* zero, const int64_t* out, int64_t i, int64_t run, int64_t count, Task& task) {
  const int64_t move = p.transposed ? 1 : p.stride[2], width = p.in[2], ld = p.ld;
  for (size_t t = 0; t < phase.taps.size(); t++) {
    const Tap& tap = phase.taps[t];
    const uint8_t** rows = task.rows.data() + t * count + i;
    const int64_t z = locate(p, 0, out[0], tap), y = locate(p, 1, out[1], tap), x = locate(p, 2, out[2], tap);
    if (z < 0 || z >= p.in[0] || y < 0 || y >= p.in[1]) {
      std::fill(rows, rows + run, zero);
      continue;
    }
    const uint8_t* line = image + (z * p.in[1] + y) * width * ld;
    for (int64_t k = 0; k < run; k++) {
      const int64_t at = x + k * move;
      rows[k] = static_cast<uint64_t>(at) < static_cast<uint64_t>(width) ? line + at * ld : zero;
    }
  }
}

void write_rows(const Conv& p, const Phase& phase, const uint8_t* zeros, int64_t first, int64_t count, Task& task) {
  task.rows.resize(phase.taps.size() * count);
  task.out.resize(count);
  task.image.resize(count);
  const int64_t plane = p.in[0] * p.in[1] * p.in[2] * p.ld;
  int64_t at[3], flat = first;
  at[2] = flat % phase.count[2], flat /= phase.count[2];
  at[1] = flat % phase.count[1], flat /= phase.count[1];
  at[0] = flat % phase.count[0];
  int64_t image = flat / phase.count[0];
  for (int64_t i = 0; i < count;) {
    const int64_t run = std::min(count - i, phase.count[2] - at[2]);
    int64_t out[3];
    for (int a = 0; a < 3; a++) out[a] = phase.first[a] + phase.step[a] * at[a];
    const int64_t row = ((image * p.size[0] + out[0]) * p.size[1] + out[1]) * p.size[2] + out[2];
    for (int64_t k = 0; k < run; k++) {
      task.out[i + k] = row + k * phase.step[2];
      task.image[i + k] = image;
    }
    const uint8_t* zero = zeros + (p.sample_zero ? image * (p.channels + SLACK) : 0);
    write_run(p, phase, p.x + image * plane, zero, out, i, run, count, task);
    i += run;
    at[2] = 0;
    if (++at[1] == phase.count[1]) {
      at[1] = 0;
      if (++at[0] == phase.count[0]) at[0] = 0, image++;
    }
  }
}

template <bool OTHER, bool LOW>
inline void finish_wide(const Epilogue& e, const Task& task, const int32_t* sums, int64_t pixel, int rows, int64_t column) {
  const __m512i order = packed_order();
  __m512 alpha[4], beta[4], high[4];
  const __m512 shift = _mm512_set1_ps(OTHER ? e.other_zero * e.other_scale : 0.0f);
  for (int v = 0; v < 4; v++) {
    alpha[v] = _mm512_loadu_ps(e.alpha + column + 16 * v);
    beta[v] = _mm512_sub_ps(_mm512_loadu_ps(e.beta + column + 16 * v), shift);
    high[v] = e.slope ? _mm512_loadu_ps(e.slope + column + 16 * v) : _mm512_set1_ps(e.high);
  }
  for (int r = 0; r < rows; r++) finish_codes<OTHER, LOW>(e, sums + r * COLUMNS, task.out[pixel + r], column, alpha, beta, high, order);
}

using WideFinish = void (*)(const Epilogue&, const Task&, const int32_t*, int64_t, int, int64_t);
constexpr WideFinish WIDE_FINISH[] = {finish_wide<false, false>, finish_wide<false, true>, finish_wide<true, false>, finish_wide<true, true>};

void finish_tile(const Conv& p, const Epilogue& e, const Phase& phase, const Task& task, int32_t* sums, int64_t pixel, int rows, int64_t column, int64_t end) {
  if (p.direct && !p.sample_scale && end - column >= COLUMNS && (!p.other || p.other_type == U8))
    return WIDE_FINISH[(p.other ? 2 : 0) + (p.low > 0)](e, task, sums, pixel, rows, column);
  for (int64_t v = 0; v < COLUMNS && column + v < end; v += 16) {
    const int64_t n = column + v;
    const __mmask16 mask = lanes(end - n);
    const __m512 alpha = _mm512_maskz_loadu_ps(mask, p.alpha + n), beta = _mm512_maskz_loadu_ps(mask, p.beta + n);
    for (int r = 0; r < rows; r++) {
      __m512i sum = _mm512_loadu_si512(sums + r * COLUMNS + v);
      float sample = 1.0f;
      if (p.sample_scale) {
        const int64_t image = task.image[pixel + r];
        const __m512i offset = _mm512_maskz_loadu_epi32(mask, phase.offset + n);
        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(p.sample_zero[image]), offset));
        sample = p.sample_scale[image];
      }
      finish_lanes(e, sum, task.out[pixel + r], n, mask, alpha, beta, sample);
    }
  }
}

void run_task(const Conv& p, const Phase& phase, const uint8_t* zeros, int64_t first, int64_t count, int64_t panel, int64_t panel_end) {
  static thread_local Task task;
  alignas(64) int32_t sums[ROWS * COLUMNS], start[COLUMNS];
  const Epilogue e = epilogue(p);
  const int64_t taps = phase.taps.size(), all_taps = p.fold ? p.kernel[0] * p.kernel[1] : p.kernel[0] * p.kernel[1] * p.kernel[2];
  const int64_t per_group = p.channels / p.groups, width = p.fold ? p.kernel[2] * p.channels : per_group;
  const int64_t n_group = p.n / p.groups, panels = (n_group + COLUMNS - 1) / COLUMNS;
  const int64_t tap_lanes = (width + 3) / 4 * COLUMNS;
  const int64_t groups4 = p.fold ? (width + 3) / 4 : width / 4;
  const int rest = p.fold ? 0 : static_cast<int>(width % 4);
  static thread_local std::vector<int32_t> gathered;
  write_rows(p, phase, zeros, first, count, task);
  const int64_t tiles = (count + ROWS - 1) / ROWS;
  for (int64_t j = panel; j < panel_end; j++) {
    const int64_t group = j / panels, column = group * n_group + j % panels * COLUMNS, end = (group + 1) * n_group;
    const int32_t* w = reinterpret_cast<const int32_t*>(p.w) + j * all_taps * tap_lanes;
    if (taps != all_taps) {  // a phase of a transposed convolution: its taps side by side
      gathered.resize(taps * tap_lanes);
      for (int64_t t = 0; t < taps; t++) std::memcpy(gathered.data() + t * tap_lanes, w + phase.taps[t].index * tap_lanes, tap_lanes * 4);
      w = gathered.data();
    }
    for (int64_t c = 0; c < COLUMNS; c++) start[c] = !p.sample_scale && column + c < end ? -phase.offset[column + c] : 0;
    const int vectors = static_cast<int>(std::min<int64_t>(WIDE, (end - column + 15) / 16));
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t pixel = i * count / tiles;
      const int rows = static_cast<int>((i + 1) * count / tiles - pixel);
      const ConvTile tile = conv_choose((rows - 1) * WIDE + vectors - 1, std::make_integer_sequence<int, ROWS * WIDE>());
      // each of the first four tiles asks for a quarter of the next panel
      const int64_t quarter = all_taps * tap_lanes, here = i < 4 && j + 1 < panel_end ? quarter * (i + 4) : 0;
      const char* ahead = reinterpret_cast<const char*>(w) + here;
      tile(task.rows.data() + pixel, count, taps, p.fold ? 0 : group * per_group, groups4, rest, w, start, ahead, sums);
      finish_tile(p, e, phase, task, sums, pixel, rows, column, end);
    }
  }
}

// the four quarters of lanes of four vectors, turned: undoes what interleaving bytes did to the order of channels
inline void turn(__m512i (&s)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(s[0], s[1], 0x44), b = _mm512_shuffle_i32x4(s[2], s[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(s[0], s[1], 0xEE), d = _mm512_shuffle_i32x4(s[2], s[3], 0xEE);
  s[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  s[1] = _mm512_shuffle_i32x4(a, b, 0xDD);
  s[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  s[3] = _mm512_shuffle_i32x4(c, d, 0xDD);
}

void run_depthwise(const Conv& p, const Phase& phase, const uint8_t* zeros, int64_t first, int64_t count) {
  static thread_local Task task;
  const Epilogue e = epilogue(p);
  const int64_t taps = phase.taps.size(), fours = (taps + 3) / 4, blocks = (p.channels + 63) / 64;
  write_rows(p, phase, zeros, first, count, task);
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t channel = block * 64;
    const int64_t left = p.channels - channel;
    const __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
    const int8_t* w = p.w + block * fours * 256;
    __m512i start[4];
    for (int q = 0; q < 4; q++) {
      const __mmask16 some = left > q * 16 ? lanes(left - q * 16) : 0;
      start[q] = p.sample_scale ? _mm512_setzero_si512() : _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_maskz_loadu_epi32(some, phase.offset + channel + q * 16));
    }
    for (int64_t i = 0; i < count; i++) {
      __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t f = 0; f < fours; f++) {
        __m512i x[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
          const int64_t t = f * 4 + k;
          x[k] = t < taps ? _mm512_maskz_loadu_epi8(mask, task.rows[t * count + i] + channel) : _mm512_setzero_si512();
        }
        const __m512i lo01 = _mm512_unpacklo_epi8(x[0], x[1]), hi01 = _mm512_unpackhi_epi8(x[0], x[1]);
        const __m512i lo23 = _mm512_unpacklo_epi8(x[2], x[3]), hi23 = _mm512_unpackhi_epi8(x[2], x[3]);
        const __m512i mixed[4] = {_mm512_unpacklo_epi16(lo01, lo23), _mm512_unpackhi_epi16(lo01, lo23), _mm512_unpacklo_epi16(hi01, hi23), _mm512_unpackhi_epi16(hi01, hi23)};
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) Bytes::dot(sum[q], mixed[q], _mm512_loadu_si512(w + f * 256 + q * 64));
      }
      turn(sum);
      float sample = p.sample_scale ? p.sample_scale[task.image[i]] : 1.0f;
      for (int q = 0; q < 4 && left > q * 16; q++) {
        const int64_t n = channel + q * 16;
        const __mmask16 some = lanes(left - q * 16);
        __m512i total = _mm512_add_epi32(sum[q], start[q]);
        if (p.sample_scale) {
          const __m512i offset = _mm512_maskz_loadu_epi32(some, phase.offset + n);
          total = _mm512_sub_epi32(total, _mm512_mullo_epi32(_mm512_set1_epi32(p.sample_zero[task.image[i]]), offset));
        }
        finish_lanes(e, total, task.out[i], n, some, _mm512_maskz_loadu_ps(some, p.alpha + n), _mm512_maskz_loadu_ps(some, p.beta + n), sample);
      }
    }
  }
}

std::vector<Phase> phases_of(const Conv& p) {
  std::vector<Phase> found;
  const int64_t none[3] = {1, 1, 1};
  const int64_t* step = p.transposed ? p.stride : none;
  for (int64_t a = 0; a < step[0]; a++)
    for (int64_t b = 0; b < step[1]; b++)
      for (int64_t c = 0; c < step[2]; c++) {
        Phase phase{{a, b, c}, {step[0], step[1], step[2]}, {}, p.batch, {}, p.offset + found.size() * p.n};
        for (int i = 0; i < 3; i++) {
          phase.count[i] = phase.first[i] < p.size[i] ? (p.size[i] - phase.first[i] + step[i] - 1) / step[i] : 0;
          phase.pixels *= phase.count[i];
        }
        int64_t index = 0;
        for (int64_t z = 0; z < p.kernel[0]; z++)
          for (int64_t y = 0; y < p.kernel[1]; y++)
            for (int64_t x = 0; x < (p.fold ? 1 : p.kernel[2]); x++, index++) {
              const Tap tap{index, {z, y, x}};
              bool seen = true;
              for (int i = 0; i < 3 && p.transposed; i++) {
                const int64_t at = phase.first[i] + p.padding[i] - tap.at[i] * p.dilation[i];
                seen = seen && ((at % p.stride[i]) + p.stride[i]) % p.stride[i] == 0;
              }
              if (seen) phase.taps.push_back(tap);
            }
        found.push_back(std::move(phase));
      }
  return found;
}

// the image with a border of zero points: then no tap falls outside, and a kernel's width is one run of bytes
void pad(const Conv& p, std::vector<uint8_t>& to, int64_t* sizes) {
  for (int i = 0; i < 3; i++) sizes[i] = p.in[i] + 2 * p.padding[i];
  const int64_t line = sizes[2] * p.channels, image = sizes[0] * sizes[1] * line;
  to.resize(p.batch * image + SLACK);
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (int64_t b = 0; b < p.batch; b++)
    for (int64_t y = 0; y < sizes[0] * sizes[1]; y++) {
      const int64_t d = y / sizes[1] - p.padding[0], h = y % sizes[1] - p.padding[1];
      uint8_t* row = to.data() + b * image + y * line;
      const int zero = p.sample_zero ? p.sample_zero[b] : p.x_zero;
      if (d < 0 || d >= p.in[0] || h < 0 || h >= p.in[1]) {
        std::memset(row, zero, line);
        continue;
      }
      std::memset(row, zero, p.padding[2] * p.channels);
      std::memcpy(row + p.padding[2] * p.channels, p.x + ((b * p.in[0] + d) * p.in[1] + h) * p.in[2] * p.channels, p.in[2] * p.channels);
      std::memset(row + (p.padding[2] + p.in[2]) * p.channels, zero, p.padding[2] * p.channels);
    }
}

}  // namespace qpass

extern "C" void qpass_conv(const qpass::Conv* args) {
  using namespace qpass;
  Conv p = *args;
  static thread_local std::vector<uint8_t> padded, zeros;
  if (p.fold) {
    int64_t sizes[3];
    pad(p, padded, sizes);
    p.x = padded.data();
    for (int i = 0; i < 3; i++) p.in[i] = sizes[i], p.padding[i] = 0;
  }
  const int64_t images = p.sample_zero ? p.batch : 1, row = p.channels + SLACK;
  zeros.resize(images * row);
  for (int64_t b = 0; b < images; b++) std::memset(zeros.data() + b * row, p.sample_zero ? p.sample_zero[b] : p.x_zero, row);
  const uint8_t* zero = zeros.data();
  const bool depthwise = p.groups == p.channels && p.n == p.channels && p.groups > 1 && !p.transposed;
  const int64_t panels = depthwise ? 1 : p.groups * ((p.n / p.groups + COLUMNS - 1) / COLUMNS);
  for (const Phase& phase : phases_of(p)) {
    if (phase.pixels == 0 || p.n == 0) continue;
    const int64_t wanted = 4 * p.threads, most = depthwise ? PIXELS : phase.pixels <= 2 * PIXELS ? phase.pixels : PIXELS;
    const int64_t chunks = (phase.pixels + most - 1) / most;
    const int64_t splits = std::clamp<int64_t>((wanted + chunks - 1) / chunks, 1, panels);
    const bool parallel = p.threads > 1 && phase.pixels * p.n * (p.channels / p.groups) * static_cast<int64_t>(phase.taps.size()) > (1 << 18);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads) if (parallel)
    for (int64_t task = 0; task < chunks * splits; task++) {
      const int64_t c = task / splits, s = task % splits;
      const int64_t first = c * phase.pixels / chunks, count = (c + 1) * phase.pixels / chunks - first;
      if (depthwise)
        run_depthwise(p, phase, zero, first, count);
      else
        run_task(p, phase, zero, first, count, s * panels / splits, (s + 1) * panels / splits);
    }
  }
}
