// A float image [B, C, pixels] of few channels as u8 codes [B, pixels, C]: clamp(round(x / scale) + zero, 0, max).
#pragma once
#include <cstdint>

namespace qpass {

struct Image {
  const float* x;
  uint8_t* out;
  int64_t batch, channels, pixels;
  int32_t threads;
  float scale, zero, max;
};

void run_image(const Image& p, bool shared);  // shared: team.h

}  // namespace qpass
