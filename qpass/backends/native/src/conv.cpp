// u8 x s8 convolutions: the product of a tile of output pixels and up to 64 channels stays in registers over all taps (conv.h).
//
// Weights lie as [groups][panels][taps][C / 4][width][4], width = 64 or, where a group has fewer outputs, these rounded up to
// 16. A tile is R pixels by V vectors of 16 channels, R V <= 24, so that the product instruction issues every cycle. A task is
// a chunk of pixels by some panels: its inputs stay in the L1 cache while the weights come from L2, or the other way round.
#include <algorithm>
#include <utility>

#include "conv_codes.h"
#include "tile.h"

namespace qpass {

constexpr int HIGHEST[] = {0, 14, 12, 8, 6};  // pixels of a tile by its vectors

// A panel of weights and the pixels it is multiplied with.
struct Panel {
  const int8_t* w;
  int64_t tap_bytes, width;  // bytes of one tap; lanes of a row of weights
  int64_t shift;             // bytes from a pixel's first channel to the group's
  int64_t fours;             // groups of four bytes in a tap
  int64_t n;                 // first output channel
  int64_t columns;           // output channels
  __mmask16 lanes[4];        // those of each vector
  __mmask64 mask;            // and together
};

template <int R, int V, bool SAMPLE, bool OTHER>
__attribute__((always_inline)) inline void store_codes(const Conv& p, const Chunk& chunk, const Panel& panel, int64_t m,
                                                       const __m512i (&sum)[R][V]) {
  __m512 alpha[V], beta[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    alpha[v] = _mm512_maskz_loadu_ps(panel.lanes[v], p.alpha + panel.n + 16 * v);
    beta[v] = _mm512_maskz_loadu_ps(panel.lanes[v], p.beta + panel.n + 16 * v);
  }
  const __m512i low = _mm512_set1_epi8(static_cast<char>(p.low)), high = _mm512_set1_epi8(static_cast<char>(p.high));
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    const int64_t to = chunk.at[m + r] * p.n + panel.n;
    __m512i q[4];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      __m512 y = _mm512_cvtepi32_ps(sum[r][v]);
      if (SAMPLE) y = _mm512_mul_ps(y, _mm512_set1_ps(p.sample_scale[chunk.sample[m + r]]));
      y = _mm512_fmadd_ps(y, alpha[v], beta[v]);
      if (OTHER) y = _mm512_fmadd_ps(load(p.other, U8, to + 16 * v, panel.lanes[v]), _mm512_set1_ps(p.other_scale), y);
      q[v] = to_codes(y);
    }
#pragma GCC unroll 4
    for (int v = V; v < 4; v++) q[v] = q[0];
    const __m512i codes = _mm512_min_epu8(_mm512_max_epu8(in_order<V>(q), low), high);
    if (V == 4 && panel.columns >= 64)
      _mm512_storeu_si512(static_cast<uint8_t*>(p.out) + to, codes);
    else
      _mm512_mask_storeu_epi8(static_cast<uint8_t*>(p.out) + to, panel.mask, codes);
  }
}

template <int R, int V, bool SAMPLE>
__attribute__((always_inline)) inline void store_codes(const Conv& p, const Chunk& chunk, const Panel& panel, int64_t m,
                                                       const __m512i (&sum)[R][V]) {
  if (p.other)
    store_codes<R, V, SAMPLE, true>(p, chunk, panel, m, sum);
  else
    store_codes<R, V, SAMPLE, false>(p, chunk, panel, m, sum);
}

template <int R, int V>
void conv_tile(const Conv& p, const Plan& plan, const Chunk& chunk, const Panel& panel, int64_t m) {
  __m512i sum[R][V];
  const int32_t* sample = chunk.sample.data() + m;
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const __m512i offset = _mm512_maskz_loadu_epi32(panel.lanes[v], plan.offset + panel.n + 16 * v);
    const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), offset);
#pragma GCC unroll 14
    for (int r = 0; r < R; r++)
      sum[r][v] = p.sample_zero ? _mm512_mullo_epi32(start, _mm512_set1_epi32(p.sample_zero[sample[r]])) : start;
  }
  const uint8_t* const* rows = chunk.rows.data() + m;
  const int64_t end = panel.shift + 4 * panel.fours;
  for (int tap : plan.taps) {
    const int32_t* b = reinterpret_cast<const int32_t*>(panel.w + tap * panel.tap_bytes);
    const uint8_t* a[R];
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) a[r] = rows[r];
    for (int64_t k = panel.shift; k < end; k += 4, b += panel.width) {
      __m512i columns[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) columns[v] = _mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 14
      for (int r = 0; r < R; r++) {
        int32_t four;
        std::memcpy(&four, a[r] + k, 4);
        const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) Bytes::dot(sum[r][v], x, columns[v]);
      }
    }
    rows += chunk.ld;
  }
  if (p.clamped) {
    if (p.sample_scale) return store_codes<R, V, true>(p, chunk, panel, m, sum);
    return store_codes<R, V, false>(p, chunk, panel, m, sum);
  }
  alignas(64) int32_t sums[R * V * 16];
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) _mm512_store_si512(sums + (r * V + v) * 16, sum[r][v]);
  }
  finish(p, sums, V * 16, chunk.at.data() + m, sample, R, panel.n, panel.columns);
}

using Tile = void (*)(const Conv&, const Plan&, const Chunk&, const Panel&, int64_t);

template <int V, int... I>
inline Tile tile_of(int rows, std::integer_sequence<int, I...>) {
  static constexpr Tile TILES[] = {conv_tile<I + 1, V>...};
  return TILES[rows - 1];
}

template <int V>
inline Tile tile_of(int rows) {
  return tile_of<V>(rows, std::make_integer_sequence<int, HIGHEST[V]>());
}

inline Tile tile_of(int rows, int vectors) {
  if (vectors == 4) return tile_of<4>(rows);
  if (vectors == 3) return tile_of<3>(rows);
  return vectors == 2 ? tile_of<2>(rows) : tile_of<1>(rows);
}

// How the work is cut: pixels into chunks, panels of all groups ("units") into splits; a task is one of each.
struct Cut {
  int64_t width, panels, units, fours, unit_bytes, chunk, chunks, splits;
};

constexpr int64_t FEW = 192, MANY = 384;  // pixels of a chunk: where all weights stay in the L2 cache, and where not
constexpr int64_t FINISHED = 12, LOCATED = 2, TASK = 600, FORK = 6000;  // cycles of a pixel, a pointer, a task, a second thread

// The cut that is done first, by count of cycles: threads should end together, and tasks not be too small.
void choose(const Conv& p, const Plan& plan, Cut& c, int64_t highest) {
  const int64_t pixels = plan.pixels(p), taps = static_cast<int64_t>(plan.taps.size());
  const int64_t product = taps * c.fours * c.width / 16 + FINISHED, least = (pixels + highest - 1) / highest;
  const auto cycles = [&](int64_t chunks, int64_t splits, int64_t threads) {
    const int64_t some = (pixels + chunks - 1) / chunks, units = (c.units + splits - 1) / splits;
    return (chunks * splits + threads - 1) / threads * (some * (units * product + taps * LOCATED) + TASK);
  };
  c.chunks = least;
  c.splits = 1;
  int64_t best = cycles(least, 1, 1);
  for (int64_t splits = 1; splits <= std::min<int64_t>(c.units, 4 * p.threads) && p.threads > 1; splits++)
    for (int64_t chunks = least; chunks <= std::min(least + p.threads, (pixels + 5) / 6); chunks++) {
      const int64_t found = cycles(chunks, splits, p.threads) + FORK;
      if (found >= best) continue;
      best = found;
      c.chunks = chunks;
      c.splits = splits;
    }
  c.chunk = (pixels + c.chunks - 1) / c.chunks;
  c.chunks = (pixels + c.chunk - 1) / c.chunk;
}

Cut cut(const Conv& p, const Plan& plan) {
  Cut c;
  const int64_t outputs = p.n / p.groups, all_taps = (p.folded ? 1 : p.kernel[2]) * p.kernel[0] * p.kernel[1];
  c.width = std::min<int64_t>(COLUMNS, (outputs + 15) / 16 * 16);
  c.panels = (outputs + COLUMNS - 1) / COLUMNS;
  c.units = p.groups * c.panels;
  c.fours = (plan.run + 3) / 4;
  c.unit_bytes = all_taps * c.fours * c.width * 4;
  choose(p, plan, c, c.units * c.unit_bytes > (1 << 19) ? MANY : FEW);
  return c;
}

void multiply(const Conv& p, const Plan& plan, const Cut& c, const Chunk& chunk, int64_t unit) {
  const int64_t group = unit / c.panels, outputs = p.n / p.groups, from = unit % c.panels * COLUMNS;
  Panel panel{p.w + unit * c.unit_bytes, c.fours * c.width * 4, c.width, p.folded ? 0 : group * plan.run, c.fours};
  panel.n = group * outputs + from;
  panel.columns = std::min<int64_t>(COLUMNS, outputs - from);
  for (int v = 0; v < 4; v++) panel.lanes[v] = lanes(std::max<int64_t>(0, panel.columns - 16 * v));
  panel.mask = panel.columns >= 64 ? ~0ull : (1ull << panel.columns) - 1;
  const int vectors = static_cast<int>((panel.columns + 15) / 16);
  const int64_t pixels = static_cast<int64_t>(chunk.at.size()), tiles = (pixels + HIGHEST[vectors] - 1) / HIGHEST[vectors];
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t m = t * pixels / tiles, end = (t + 1) * pixels / tiles;
    tile_of(static_cast<int>(end - m), vectors)(p, plan, chunk, panel, m);
  }
}

void convolve(const Conv& p, const Plan& plan) {
  const int64_t pixels = plan.pixels(p);
  if (pixels == 0) return;
  const Cut c = cut(p, plan);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads) if (p.threads > 1 && c.chunks * c.splits > 1)
  for (int64_t task = 0; task < c.chunks * c.splits; task++) {
    static thread_local Chunk chunk;
    const int64_t split = task % c.splits, first = task / c.splits * c.chunk;
    locate(p, plan, first, std::min(c.chunk, pixels - first), chunk);
    for (int64_t unit = split * c.units / c.splits; unit < (split + 1) * c.units / c.splits; unit++)
      multiply(p, plan, c, chunk, unit);
  }
}

}  // namespace qpass

extern "C" void qpass_conv(const qpass::Conv* args) {
  static thread_local std::vector<uint8_t> held;
  qpass::Conv p = *args;
  if (p.batch == 0 || p.n == 0) return;
  bool plain = !p.folded;
  for (int a = 0; a < 3; a++) plain = plain && p.kernel[a] == 1 && p.stride[a] == 1 && p.padding[a] == 0 && p.in[a] == p.size[a];
  if (plain) {  // one line of pixels
    p.in[2] = p.size[2] = p.in[0] * p.in[1] * p.in[2];
    p.in[0] = p.in[1] = p.size[0] = p.size[1] = 1;
  }
  std::vector<uint8_t> zeros;
  qpass::Plan plan = rows_of(p, held, zeros);
  const int64_t all[] = {-1, -1, -1};
  int64_t phases[] = {1, 1, 1};
  if (p.transposed) std::copy_n(p.stride, 3, phases);
  plan.offset = p.offset;
  for (int64_t phase = 0; phase < phases[0] * phases[1] * phases[2]; phase++, plan.offset += p.n) {
    const int64_t residues[] = {phase / phases[2] / phases[1], phase / phases[2] % phases[1], phase % phases[2]};
    qpass::set_axes(p, plan, p.transposed ? residues : all);
    qpass::convolve(p, plan);
  }
}
