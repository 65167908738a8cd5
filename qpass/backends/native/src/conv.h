// What the convolution kernels are given, and where each output pixel finds its inputs.
//
// A task is a chunk of output pixels. For each tap of the kernel it has one pointer a pixel: to the channels of a pixel of the image, or to
// a row of zero points where the tap falls outside. So the kernels multiply rows by weights and know nothing of strides and borders.
#pragma once
#include <vector>

#include "epilogue.h"

namespace qpass {

constexpr int64_t PIXELS = 48;  // of a task, at most
constexpr int64_t SLACK = 64;   // bytes that may be read behind a row

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

// A convolution that is known but for its images: what follows from its sizes is worked out once.
struct ConvWork {
  Conv conv;
  std::vector<Phase> phases;
  std::vector<uint8_t> zeros;  // rows of zero points
  int64_t padded, products;    // bytes of the padded image; multiply-adds
  int64_t sizes[3];             // of the padded image
};

struct ConvPointers {
  const uint8_t* x;
  void* out;
  const void* other;
};

ConvWork conv_work(const Conv& args);

// padded: room for work.padded bytes. shared: team.h
void run_conv(const ConvWork& work, const ConvPointers& at, uint8_t* padded, bool shared);

struct Sample {
  float scale;
  int32_t zero;  // times the offsets; 1 where these hold the zero point of all images
};

inline Sample sample_of(const Conv& p, int64_t image) {
  if (!p.sample_scale) return {1.0f, 1};
  return {p.sample_scale[image], p.sample_zero[image]};
}

struct Task {  // of one image, where images have scales of their own
  std::vector<const uint8_t*> rows;  // [tap][pixel]
  std::vector<int64_t> out;          // row of the output of each pixel
};

// What is finished by whole panels (enum Ending): an activation that only clamps, and no rounding but that of the result.
inline bool is_quick(const Conv& p) {
  if (p.out_type == U8) return p.direct == 2 && (!p.other || p.other_type != F32);
  return (p.act == CONV_NONE || p.act == CONV_RELU || p.act == CONV_RELU6) && (!p.other || p.other_type == p.out_type);
}

inline Epilogue epilogue(const Conv& p) {
  return {p.alpha,  p.beta,        p.slope,      p.other, p.out,  p.n,           p.act,      p.out_type, p.other_type,
          p.direct, p.other_scale, p.other_zero, p.low,   p.high, p.out_inverse, p.out_zero, p.out_max};
}

// the rows of output pixels first .. first + count - 1 of a phase
void write_rows(const Conv& p, const Phase& phase, const uint8_t* zeros, int64_t first, int64_t count, Task& task);

// the output pixels that see the same taps: all of them, or those of one remainder of a transposed convolution's strides
std::vector<Phase> phases_of(const Conv& p);

// the image with a border of zero points: then no tap falls outside, and a kernel's width is one run of bytes
int64_t padded_sizes(const Conv& p, int64_t* sizes);  // and the bytes it takes
void pad(const Conv& p, const int64_t* sizes, uint8_t* to, bool shared);

// where a tap of the output position `out` on one axis lies in the image; an exact division within a phase
inline int64_t locate(const Conv& p, int axis, int64_t out, const Tap& tap) {
  if (p.transposed) return (out + p.padding[axis] - tap.at[axis] * p.dilation[axis]) / p.stride[axis];
  return out * p.stride[axis] - p.padding[axis] + tap.at[axis] * p.dilation[axis];
}

// depthwise.cpp: how many units of work there are (output lines, or pixels), and some of them for some panels of 64 channels
int64_t depthwise_units(const Conv& p, const Phase& phase);
void run_depthwise(const Conv& p, const Phase& phase, const uint8_t* zeros, int64_t first, int64_t count, int64_t panel, int64_t panel_end);

}  // namespace qpass
