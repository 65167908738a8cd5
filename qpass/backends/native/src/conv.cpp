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

#include "conv.h"
#include "team.h"
#include "tile.h"

namespace qpass {

// R pixels by V vectors of channels: what to multiply, and where to the sums or, finished, the codes go
struct ConvTile {
  const uint8_t* const* rows;  // [tap][pixel], or none: then the pixels lie `move` apart from `plain` on
  const uint8_t* plain;
  int64_t move, ld, taps, channel, groups;
  int rest;  // bytes of a tap beyond the last whole group
  const int32_t *b, *start;
  const char* ahead;  // of the next panel, to ask for
  int32_t* sums;      // [R][64], where the codes are not written at once
  const Epilogue* epilogue;
  const Panel* panel;  // where they are
  const int64_t* out;  // rows of the output, or none: then they are row, row + 1, ..
  int64_t row;
};

template <int R, int V>
void conv_tile(const ConvTile& p) {
  __m512i sum[R][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const __m512i first = _mm512_loadu_si512(p.start + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) sum[r][v] = first;
  }
  const int32_t* b = p.b;
  const char* ahead = p.ahead;
  for (int64_t t = 0; t < p.taps; t++) {
    const uint8_t* a[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) a[r] = (p.rows ? p.rows[t * p.ld + r] : p.plain + r * p.move) + p.channel;
    for (int64_t g = 0; g < p.groups; g++, b += COLUMNS, ahead += 64) {
      _mm_prefetch(ahead, _MM_HINT_T1);
      int32_t four[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) std::memcpy(&four[r], a[r] + 4 * g, 4);
      step<Bytes, R, V>(sum, four, b);
    }
    if (p.rest) {
      int32_t four[R] = {};
      for (int r = 0; r < R; r++) std::memcpy(&four[r], a[r] + 4 * p.groups, p.rest);
      step<Bytes, R, V>(sum, four, b);
      b += COLUMNS;
    }
  }
  if (p.panel) {
    const Epilogue& e = *p.epilogue;
    const auto finish = [&](auto how) __attribute__((always_inline)) {
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) finish_pixel<decltype(how)::value, V>(e, *p.panel, p.out ? p.out[r] : p.row + r, sum[r]);
    };
    if (e.out_type == F32) return finish(std::integral_constant<int, FLOATS>());
    if (e.out_type == BF16) return finish(std::integral_constant<int, HALVES>());
    if (!e.other) return finish(std::integral_constant<int, CODES>());
    return e.other_type == U8 ? finish(std::integral_constant<int, ADD_CODES>()) : finish(std::integral_constant<int, ADD_HALVES>());
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) _mm512_storeu_si512(p.sums + r * COLUMNS + 16 * v, sum[r][v]);
  }
}

using RunTile = void (*)(const ConvTile&);

template <int... I>
inline RunTile conv_choose(int at, std::integer_sequence<int, I...>) {
  static constexpr RunTile TILES[] = {conv_tile<I / WIDE + 1, I % WIDE + 1>...};
  return TILES[at];
}

// any epilogue
void finish_tile(const Epilogue& e, const int64_t* out, const int32_t* sums, int rows, int64_t column, int64_t end, float sample) {
  for (int64_t v = 0; v < COLUMNS && column + v < end; v += 16) {
    const int64_t n = column + v;
    const __mmask16 mask = lanes(end - n);
    const __m512 alpha = _mm512_maskz_loadu_ps(mask, e.alpha + n), beta = _mm512_maskz_loadu_ps(mask, e.beta + n);
    for (int r = 0; r < rows; r++) finish_lanes(e, _mm512_loadu_si512(sums + r * COLUMNS + v), out[r], n, mask, alpha, beta, sample);
  }
}

// one tap, and each output pixel has its own: rows need no table
bool is_plain(const Conv& p) {
  bool found = !p.transposed;
  for (int i = 0; i < 3; i++) found = found && p.kernel[i] == 1 && p.stride[i] == 1 && p.padding[i] == 0 && p.in[i] == p.size[i];
  return found;
}

void run_product(const Conv& p, const Phase& phase, const uint8_t* zeros, int64_t first, int64_t count, int64_t panel, int64_t panel_end) {
  static thread_local Task task;
  alignas(64) int32_t sums[ROWS * COLUMNS], start[COLUMNS];
  const Epilogue e = epilogue(p);
  const Sample sample = sample_of(p, first / (phase.pixels / p.batch));
  const bool quick = is_quick(p);
  const int64_t taps = phase.taps.size(), all_taps = p.fold ? p.kernel[0] * p.kernel[1] : p.kernel[0] * p.kernel[1] * p.kernel[2];
  const int64_t per_group = p.channels / p.groups, width = p.fold ? p.kernel[2] * p.channels : per_group;
  const int64_t n_group = p.n / p.groups, panels = (n_group + COLUMNS - 1) / COLUMNS;
  const int64_t tap_lanes = (width + 3) / 4 * COLUMNS;
  const int64_t groups4 = p.fold ? (width + 3) / 4 : width / 4;
  const int rest = p.fold ? 0 : static_cast<int>(width % 4);
  static thread_local std::vector<int32_t> gathered;
  const bool plain = quick && is_plain(p);
  if (!plain) write_rows(p, phase, zeros, first, count, task);
  const int64_t tiles = (count + ROWS - 1) / ROWS;
  for (int64_t j = panel; j < panel_end; j++) {
    const int64_t group = j / panels, column = group * n_group + j % panels * COLUMNS, end = (group + 1) * n_group;
    const int32_t* w = reinterpret_cast<const int32_t*>(p.w) + j * all_taps * tap_lanes;
    if (taps != all_taps) {  // a phase of a transposed convolution: its taps side by side
      gathered.resize(taps * tap_lanes);
      for (int64_t t = 0; t < taps; t++) std::memcpy(gathered.data() + t * tap_lanes, w + phase.taps[t].index * tap_lanes, tap_lanes * 4);
      w = gathered.data();
    }
    for (int64_t c = 0; c < COLUMNS; c += 16) {
      const __mmask16 some = column + c >= end ? 0 : lanes(end - column - c);
      const __m512i offset = _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(some, phase.offset + column + c), _mm512_set1_epi32(sample.zero));
      _mm512_store_si512(start + c, _mm512_sub_epi32(_mm512_setzero_si512(), offset));
    }
    const int vectors = static_cast<int>(std::min<int64_t>(WIDE, (end - column + 15) / 16));
    const Panel panel = quick ? panel_of(e, column, end, sample.scale) : Panel();
    ConvTile tile{nullptr, nullptr, p.ld, count, taps, p.fold ? 0 : group * per_group, groups4, rest, w, start, nullptr, sums, &e, quick ? &panel : nullptr, nullptr, 0};
    for (int64_t i = 0, pixel = 0; i < tiles; i++) {
      const int rows = static_cast<int>(count / tiles + (i < count % tiles));
      // each of the first four tiles asks for a quarter of the next panel
      const int64_t quarter = all_taps * tap_lanes, here = i < 4 && j + 1 < panel_end ? quarter * (i + 4) : 0;
      tile.ahead = reinterpret_cast<const char*>(w) + here;
      if (plain) {
        tile.row = first + pixel;
        tile.plain = p.x + tile.row * p.ld;
      } else {
        tile.rows = task.rows.data() + pixel;
        tile.out = task.out.data() + pixel;
      }
      conv_choose((rows - 1) * WIDE + vectors - 1, std::make_integer_sequence<int, ROWS * WIDE>())(tile);
      if (!quick) finish_tile(e, task.out.data() + pixel, sums, rows, column, end, sample.scale);
      pixel += rows;
    }
  }
}

bool is_depthwise(const Conv& p) { return p.groups == p.channels && p.n == p.channels && p.groups > 1 && !p.transposed; }

ConvWork conv_work(const Conv& args) {
  ConvWork work{args, {}, {}, 0, 0, {0, 0, 0}};
  const Conv& p = work.conv;
  if (p.fold) work.padded = padded_sizes(p, work.sizes);
  work.phases = phases_of(p);
  for (const Phase& phase : work.phases) work.products += phase.pixels * p.n * (p.channels / p.groups) * static_cast<int64_t>(phase.taps.size());
  const int64_t images = p.sample_zero ? p.batch : 1, row = p.channels + SLACK;
  work.zeros.resize(images * row);
  for (int64_t b = 0; b < images; b++) std::memset(work.zeros.data() + b * row, p.sample_zero ? p.sample_zero[b] : p.x_zero, row);
  return work;
}

void run_conv(const ConvWork& work, const ConvPointers& at, uint8_t* padded, bool shared) {
  Conv p = work.conv;
  p.x = at.x, p.out = at.out, p.other = at.other;
  if (p.fold) {
    pad(p, work.sizes, padded, shared);
    p.x = padded;
    for (int i = 0; i < 3; i++) p.in[i] = work.sizes[i], p.padding[i] = 0;
  }
  const uint8_t* zero = work.zeros.data();
  const bool depthwise = is_depthwise(p);
  const int64_t panels = depthwise ? (p.n + COLUMNS - 1) / COLUMNS : p.groups * ((p.n / p.groups + COLUMNS - 1) / COLUMNS);
  for (const Phase& phase : work.phases) {
    if (phase.pixels == 0 || p.n == 0) continue;
    const int64_t images = p.sample_scale ? p.batch : 1;  // a task has one scale
    const int64_t units = (depthwise ? depthwise_units(p, phase) : phase.pixels) / images, pixels = phase.pixels / images / units;  // of a unit
    const int64_t usual = std::max<int64_t>(1, PIXELS / pixels), most = !depthwise && units <= 2 * usual ? units : usual;
    const int64_t chunks = (units + most - 1) / most, wanted = shared ? 8 * p.threads : 1;
    const int64_t splits = std::clamp<int64_t>((wanted + chunks * images - 1) / (chunks * images), 1, panels);
    each_task(images * chunks * splits, shared, [&](int64_t task) {
      const int64_t image = task / (chunks * splits), c = task / splits % chunks, s = task % splits;
      const int64_t first = image * units + c * units / chunks, count = (c + 1) * units / chunks - c * units / chunks;
      const auto run = depthwise ? run_depthwise : run_product;
      run(p, phase, zero, first, count, s * panels / splits, (s + 1) * panels / splits);
    });
  }
}

}  // namespace qpass

extern "C" void qpass_conv(const qpass::Conv* args) {
  using namespace qpass;
  const ConvWork work = conv_work(*args);
  static thread_local std::vector<uint8_t> buffer;
  buffer.resize(std::max<size_t>(buffer.size(), work.padded));
  uint8_t* padded = buffer.data();
  const ConvPointers at{args->x, args->out, args->other};
#pragma omp parallel num_threads(args->threads) if (args->threads > 1 && work.products > (1 << 18))
  run_conv(work, at, padded, true);
}
