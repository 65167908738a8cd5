// Max pooling of u8 images, channels last: the largest code of each window.
#pragma once
#include <cstdint>

namespace qpass {

struct Pool {
  const uint8_t* x;
  uint8_t* out;
  int64_t batch, channels;
  int64_t in[3], size[3], kernel[3], stride[3], padding[3], dilation[3];
  int32_t threads;
};

void run_pool(const Pool& p, bool shared);  // shared: team.h

}  // namespace qpass
