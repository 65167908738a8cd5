// Where the taps of output pixels lie (conv.h).
#include "conv.h"

#include <algorithm>
#include <cstring>

#include "team.h"

namespace qpass {

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
    for (int64_t k = 0; k < run; k++) task.out[i + k] = row + k * phase.step[2];
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

int64_t padded_sizes(const Conv& p, int64_t* sizes) {
  for (int i = 0; i < 3; i++) sizes[i] = std::max(p.in[i] + p.padding[i], (p.size[i] - 1) * p.stride[i] + (p.kernel[i] - 1) * p.dilation[i] + 1);
  return p.batch * sizes[0] * sizes[1] * sizes[2] * p.channels + SLACK;
}

void pad(const Conv& p, const int64_t* sizes, uint8_t* to, bool shared) {
  const int64_t* in = p.in;
  const int64_t line = sizes[2] * p.channels, lines = p.batch * sizes[0] * sizes[1], some = 8;
  each_task((lines + some - 1) / some, shared, [&](int64_t task) {
    for (int64_t i = task * some; i < std::min(lines, (task + 1) * some); i++) {
      const int64_t b = i / (sizes[0] * sizes[1]), d = i / sizes[1] % sizes[0] - p.padding[0], h = i % sizes[1] - p.padding[1];
      uint8_t* row = to + i * line;
      const int zero = p.sample_zero ? p.sample_zero[b] : p.x_zero;
      if (d < 0 || d >= in[0] || h < 0 || h >= in[1]) {
        std::memset(row, zero, line);
        continue;
      }
      std::memset(row, zero, p.padding[2] * p.channels);
      std::memcpy(row + p.padding[2] * p.channels, p.x + ((b * in[0] + d) * in[1] + h) * in[2] * p.channels, in[2] * p.channels);
      const int64_t end = p.padding[2] + in[2];
      std::memset(row + end * p.channels, zero, (sizes[2] - end) * p.channels);
    }
  });
}

}  // namespace qpass
