// Where the inputs of output pixels lie (conv.h).
//
// A convolution of few channels is folded: the taps along the width lie side by side in memory, so they are one tap of
// width * channels bytes, read from a copy whose rows are padded. With a dilation along the width the copy holds the taps of
// each position side by side. A copy with some bytes to spare is also read where channels are no multiple of four.
#include <algorithm>

#include "conv.h"

namespace qpass {

constexpr int64_t SPARE = 64;

Axis axis(const Conv& p, int which, int64_t residue) {
  const int64_t stride = p.stride[which], padding = p.padding[which], dilation = p.dilation[which];
  const int64_t step = residue < 0 ? 1 : stride, first = std::max<int64_t>(residue, 0);
  Axis found{p.in[which], 0, first, step, {}, {}};
  found.count = std::max<int64_t>(0, (p.size[which] - first + step - 1) / step);
  for (int64_t tap = 0; tap < p.kernel[which]; tap++) {
    if (residue >= 0 && (first + padding - tap * dilation) % stride) continue;
    found.taps.push_back(static_cast<int>(tap));
    for (int64_t i = 0; i < found.count; i++) {
      int64_t at = first + i * step;
      if (p.transposed) {
        at += padding - tap * dilation;
        at = at < 0 || at % stride ? -1 : at / stride;
      } else {
        at = at * stride + tap * dilation - padding;
      }
      found.at.push_back(at < found.in ? at : -1);
    }
  }
  return found;
}

// Rows padded along the width, of samples whose zero points are in `zeros`.
void copy_rows(const Conv& p, Plan& plan, std::vector<uint8_t>& held) {
  const int64_t c = p.channels, wide = p.in[2] + 2 * p.padding[2], kernel = p.kernel[2], dilation = p.dilation[2];
  const bool gather = p.folded && dilation > 1;
  const int64_t positions = gather ? std::max<int64_t>(0, wide - (kernel - 1) * dilation) : wide;
  const int64_t lines = p.batch * p.in[0] * p.in[1];
  plan.pixel = gather ? kernel * c : c;
  plan.row = positions * plan.pixel;
  held.resize(std::max<size_t>(held.size(), lines * plan.row + SPARE));
#pragma omp parallel for num_threads(p.threads) if (p.threads > 1 && lines * plan.row > (1 << 16))
  for (int64_t line = 0; line < lines; line++) {
    const uint8_t* source = p.x + line * p.in[2] * c;
    const uint8_t zero = plan.zeros[line / (p.in[0] * p.in[1]) * plan.zeros_step];
    uint8_t* target = held.data() + line * plan.row;
    if (!gather) {
      std::memset(target, zero, p.padding[2] * c);
      std::memcpy(target + p.padding[2] * c, source, p.in[2] * c);
      std::memset(target + (p.padding[2] + p.in[2]) * c, zero, p.padding[2] * c);
      continue;
    }
    for (int64_t i = 0; i < positions; i++)
      for (int64_t tap = 0; tap < kernel; tap++, target += c) {
        const int64_t at = i + tap * dilation - p.padding[2];
        if (at < 0 || at >= p.in[2])
          std::memset(target, zero, c);
        else
          std::memcpy(target, source + at * c, c);
      }
  }
  plan.x = held.data();
}

Plan rows_of(const Conv& p, std::vector<uint8_t>& held, std::vector<uint8_t>& zeros) {
  Plan plan{p.x, p.channels, p.in[2] * p.channels};
  plan.run = p.folded ? p.kernel[2] * p.channels : p.channels / p.groups;
  const int64_t row = std::max(plan.run, p.channels) + SPARE;
  plan.zeros_step = p.sample_zero ? row : 0;
  zeros.resize(p.sample_zero ? std::max<int64_t>(p.batch, 1) * row : row);
  if (p.sample_zero)
    for (int64_t b = 0; b < p.batch; b++) std::memset(zeros.data() + b * row, p.sample_zero[b], row);
  else
    std::memset(zeros.data(), p.x_zero, row);
  plan.zeros = zeros.data();
  if (p.folded) copy_rows(p, plan, held);
  if (!p.folded && !p.depthwise() && plan.run % 4) {
    const int64_t bytes = p.batch * p.in[0] * p.in[1] * plan.row;
    held.resize(std::max<size_t>(held.size(), bytes + SPARE));
    std::memcpy(held.data(), p.x, bytes);
    plan.x = held.data();
  }
  plan.plane = p.in[1] * plan.row;
  plan.image = p.in[0] * plan.plane;
  return plan;
}

void set_axes(const Conv& p, Plan& plan, const int64_t* residues) {
  Conv q = p;
  if (p.folded) {
    q.in[2] = std::max<int64_t>(0, p.in[2] + 2 * p.padding[2] - (p.kernel[2] - 1) * p.dilation[2]);
    q.kernel[2] = 1;
    q.padding[2] = 0;
  }
  for (int a = 0; a < 3; a++) plan.axes[a] = axis(q, a, residues[a]);
  for (int64_t& at : plan.axes[2].at) at *= plan.pixel;
  plan.taps.clear();
  for (int d : plan.axes[0].taps)
    for (int h : plan.axes[1].taps)
      for (int w : plan.axes[2].taps) plan.taps.push_back((d * q.kernel[1] + h) * q.kernel[2] + w);
}

void locate(const Conv& p, const Plan& plan, int64_t first, int64_t count, Chunk& chunk) {
  const Axis &depth = plan.axes[0], &height = plan.axes[1], &width = plan.axes[2];
  chunk.first = first;
  chunk.ld = count;
  chunk.rows.resize(std::max<size_t>(1, plan.taps.size()) * count);
  chunk.at.resize(count);
  chunk.sample.resize(count);
  int64_t length = 0;
  for (int64_t done = 0; done < count; done += length) {
    const int64_t pixel = first + done, w = pixel % width.count, line = pixel / width.count;
    const int64_t h = line % height.count, d = line / height.count % depth.count, b = line / height.count / depth.count;
    length = std::min(count - done, width.count - w);
    const int64_t to = ((b * p.size[0] + depth.first + d * depth.step) * p.size[1] + height.first + h * height.step) * p.size[2];
    for (int64_t i = 0; i < length; i++) {
      chunk.at[done + i] = to + width.first + (w + i) * width.step;
      chunk.sample[done + i] = static_cast<int32_t>(b);
    }
    const uint8_t* zero = plan.zeros + b * plan.zeros_step;
    const uint8_t** target = chunk.rows.data() + done;
    for (size_t td = 0; td < depth.taps.size(); td++)
      for (size_t th = 0; th < height.taps.size(); th++) {
        const int64_t in_d = depth.at[td * depth.count + d], in_h = height.at[th * height.count + h];
        const uint8_t* line_at = plan.x + b * plan.image + in_d * plan.plane + in_h * plan.row;
        for (size_t tw = 0; tw < width.taps.size(); tw++, target += count) {
          const int64_t* at = width.at.data() + tw * width.count + w;
          if (in_d < 0 || in_h < 0)
            std::fill(target, target + length, zero);
          else
            for (int64_t i = 0; i < length; i++) target[i] = at[i] < 0 ? zero : line_at + at[i];
        }
      }
  }
}

}  // namespace qpass
