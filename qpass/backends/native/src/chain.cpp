// Convolutions and pools that follow each other, as one call: what lies between them stays in a buffer of the thread that runs it.
//
// Of a batch, each thread takes one image after the other through the whole chain, so values stay in its cache and threads never wait for
// each other. The images that are left when the threads have had the same number each go through the chain together, and all threads share
// each step.
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>

#include "conv.h"
#include "image.h"
#include "pool.h"
#include "team.h"

namespace qpass {

enum Kind { CONV = 0, POOL = 1, IMAGE = 2 };

struct Ref {         // where a tensor lies
  int64_t outer;     // which of the tensors the call is given, or -1: in the buffer, -2: nowhere
  int64_t offset;    // there, in bytes of one image
  int64_t bytes;     // of an image
};

struct Step {
  int64_t kind;
  Ref x, out, other;
  union {
    Conv conv;
    Pool pool;
    Image image;
  };
};

struct Ready {  // a step for one number of images
  Step step;
  ConvWork work;
};

struct Chain {
  int64_t threads, rounds, rest;     // rounds: images of each thread
  int64_t room;                      // bytes of the buffer, of one image
  std::vector<Ready> one, together;  // for an image alone, and for `rest` of them
  int64_t padded_one = 0, padded_together = 0;  // bytes behind the room, for a padded image
};

struct Buffer {
  uint8_t* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
  bool reserve(int64_t bytes) {
    constexpr int64_t PAGE = 1 << 21;
    if (bytes <= size) return true;
    std::free(data);
    size = (bytes + PAGE - 1) / PAGE * PAGE;
    data = static_cast<uint8_t*>(std::aligned_alloc(PAGE, size));
    if (data == nullptr) return size = 0, false;
    madvise(data, size, MADV_HUGEPAGE);
    return true;
  }
};

std::vector<Ready> ready(const Step* steps, int64_t count, int64_t batch, int32_t threads) {
  std::vector<Ready> made;
  for (int64_t i = 0; i < count; i++) {
    Ready one{steps[i], {}};
    if (one.step.kind == CONV) {
      one.step.conv.batch = batch, one.step.conv.threads = threads;
      one.work = conv_work(one.step.conv);
    }
    if (one.step.kind == POOL) one.step.pool.batch = batch;
    if (one.step.kind == IMAGE) one.step.image.batch = batch;
    made.push_back(std::move(one));
  }
  return made;
}

int64_t largest_padded(const std::vector<Ready>& steps) {
  int64_t found = 0;
  for (const Ready& one : steps) found = std::max(found, one.work.padded);
  return found;
}

// images first .. of the call, as many as the steps were made ready for
void run_steps(const Chain& chain, const std::vector<Ready>& steps, int64_t first, int64_t images, void* const* given, uint8_t* buffer, bool shared) {
  const auto at = [&](const Ref& ref) { return ref.outer < 0 ? buffer + ref.offset * images : static_cast<uint8_t*>(given[ref.outer]) + ref.offset + first * ref.bytes; };
  uint8_t* padded = buffer + chain.room * images;
  for (const Ready& one : steps) {
    const Step& step = one.step;
    if (step.kind == CONV) {
      run_conv(one.work, {at(step.x), at(step.out), step.other.outer == -2 ? nullptr : at(step.other)}, padded, shared);
    } else if (step.kind == POOL) {
      Pool pool = step.pool;
      pool.x = at(step.x), pool.out = at(step.out);
      run_pool(pool, shared);
    } else {
      Image image = step.image;
      image.x = reinterpret_cast<const float*>(at(step.x)), image.out = at(step.out);
      run_image(image, shared);
    }
  }
}

}  // namespace qpass

extern "C" void* qpass_chain_new(const qpass::Step* steps, int64_t count, int64_t batch, int64_t threads, int64_t room) {
  using namespace qpass;
  std::vector<Ready> one = ready(steps, count, 1, threads);
  int64_t products = 0;
  for (const Ready& step : one) products += step.work.products * batch;
  if (products <= 1 << 18) threads = 1;
  Chain* chain = new Chain{threads, batch / threads, batch % threads, room, std::move(one), {}};
  if (chain->rest) chain->together = ready(steps, count, chain->rest, threads);
  chain->padded_one = largest_padded(chain->one);
  chain->padded_together = largest_padded(chain->together);
  return chain;
}

extern "C" void qpass_chain_free(qpass::Chain* chain) { delete chain; }

// given: the tensors that steps refer to. Returns 0, or 1 where there is no memory for the buffers.
extern "C" int32_t qpass_chain_run(const qpass::Chain* chain, void* const* given) {
  using namespace qpass;
  static thread_local Buffer own;
  const Chain& c = *chain;
  const int64_t alone = c.rounds * c.threads;
  std::atomic<int32_t> failed{0};
  Buffer* common = &own;  // of the caller
  if (!own.reserve(std::max(c.room + c.padded_one, c.rest * c.room + c.padded_together))) return 1;
#pragma omp parallel num_threads(c.threads)
  {
    if (alone) {
      const bool enough = own.reserve(c.room + c.padded_one);
      if (!enough) failed = 1;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < alone; i++)
        if (enough) run_steps(c, c.one, i, 1, given, own.data, false);
    }
    if (c.rest && !failed) run_steps(c, c.together, alone, c.rest, given, common->data, true);
  }
  return failed;
}
