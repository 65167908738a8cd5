// What the convolution kernels are given, and where each output pixel finds its inputs.
//
//     y[m, n] = act((acc[m, n] - zero[m] * offset[n]) * alpha[n] * scale[m] + beta[n] + other[m, n])
//
// All images are channels-last: [batch][depth][height][width][channels]; fewer axes have sizes of 1 in front. For each tap of the
// kernel an output pixel has one pointer: to the channels of an input pixel, or to a row of zero points where that lies in the
// padding. So the kernels multiply rows by weights and know nothing of strides, dilation or borders.
#pragma once
#include <vector>

#include "simd.h"
#include "values.h"

namespace qpass {

struct Conv {
  const uint8_t* x;
  const int8_t* w;
  const float *alpha, *beta;
  const int32_t* offset;  // [phases][n]; times the zero point where there is no sample_zero
  const float *slope, *sample_scale;
  const int32_t* sample_zero;
  const void* other;
  void* out;
  int64_t batch, channels, n, groups, in[3], size[3], kernel[3], stride[3], padding[3], dilation[3];
  // clamped: codes = clamp(round(acc * alpha + beta), low, high), the output's scale being part of alpha and beta
  int32_t transposed, folded, x_zero, act, out_type, other_type, threads, clamped, low, high;
  float out_inverse, out_zero, other_scale, other_zero;

  bool depthwise() const { return groups == channels && groups == n; }
};

// One axis of the outputs first, first + step, ...: at[tap][i] is the input's coordinate for output i, or negative.
struct Axis {
  int64_t in, count, first, step;
  std::vector<int> taps;
  std::vector<int64_t> at;
};

// residue: the outputs that are congruent to it modulo the stride of a transposed convolution, with the taps they have;
// negative: all outputs and all taps.
Axis axis(const Conv& p, int which, int64_t residue);

// The inputs of a convolution as rows of pixels, and the axes of one phase of its outputs.
struct Plan {
  const uint8_t* x;
  int64_t pixel, row, plane, image;  // bytes
  int64_t run;                       // bytes of one tap
  const uint8_t* zeros;              // rows of zero points
  int64_t zeros_step;                // bytes from one sample's to the next
  Axis axes[3];
  std::vector<int> taps;  // index of the weights
  const int32_t* offset;

  int64_t pixels(const Conv& p) const { return p.batch * axes[0].count * axes[1].count * axes[2].count; }
};

// Some output pixels: their pointers, [taps][ld]; the index of each in the output, and of its sample.
struct Chunk {
  int64_t first = 0, ld = 0;
  std::vector<const uint8_t*> rows;
  std::vector<int64_t> at;
  std::vector<int32_t> sample;
};

// The rows that do not change from phase to phase; held: what they may be copied to.
Plan rows_of(const Conv& p, std::vector<uint8_t>& held, std::vector<uint8_t>& zeros);

void set_axes(const Conv& p, Plan& plan, const int64_t* residues);

void locate(const Conv& p, const Plan& plan, int64_t first, int64_t count, Chunk& chunk);

// Stores rows of sums, [rows][ld], at the columns n .. n + columns of the pixels at[0 .. rows - 1].
void finish(const Conv& p, const int32_t* sums, int64_t ld, const int64_t* at, const int32_t* sample, int rows, int64_t n,
            int64_t columns);

}  // namespace qpass
