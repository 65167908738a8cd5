// The one inner loop: R rows by 16 V columns of sums in registers, fed four bytes of each operand a step.
//
//     sum[r][c] += dot(a[r][g], b[g][c])      g = 0 .. groups - 1
//
// a: rows of four-byte groups (4 u8, 2 bf16 or 1 f32). b: [groups][ldb] lanes of four bytes (4 s8, 2 bf16 or 1 f32). With R = 6 and
// V = 4 there are 24 independent sums, so the product instruction issues every cycle.
#pragma once
#include <algorithm>
#include <utility>

#include "simd.h"

namespace qpass {

constexpr int ROWS = 6, WIDE = 4, COLUMNS = 16 * WIDE;

// Products as text: given the intrinsics, gcc 12 copies and spills the sums.
struct Bytes {  // u8 x s8 -> i32
  __attribute__((always_inline)) static inline void dot(__m512i& sum, __m512i a, __m512i b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};

struct Floats {  // f32 x f32 -> f32
  __attribute__((always_inline)) static inline void dot(__m512i& sum, __m512i a, __m512i b) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};

#ifdef __AVX512BF16__
struct Halves {  // bf16 x bf16 -> f32
  __attribute__((always_inline)) static inline void dot(__m512i& sum, __m512i a, __m512i b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};
#endif

struct Operands {
  const uint8_t* a;
  int64_t lda;  // bytes
  const int32_t* b;
  int64_t ldb;  // lanes
  int64_t groups;
  int rest;  // bytes of a beyond the last whole group; b is zero padded
  void* out;
  int64_t ldo;  // lanes
};

template <class Op, int R, int V>
__attribute__((always_inline)) inline void step(__m512i (&sum)[R][V], const int32_t* four, const int32_t* b) {
  __m512i columns[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) columns[v] = _mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    const __m512i a = _mm512_set1_epi32(four[r]);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) Op::dot(sum[r][v], a, columns[v]);
  }
}

template <class Op, int R, int V>
void tile(const Operands& p) {
  __m512i sum[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_si512();
  }
  const uint8_t* a = p.a;
  const int32_t* b = p.b;
  const int64_t lda = p.lda, ldb = p.ldb;
  for (int64_t g = 0; g < p.groups; g++, a += 4, b += ldb) {
    int32_t four[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) std::memcpy(&four[r], a + r * lda, 4);
    step<Op, R, V>(sum, four, b);
  }
  if (p.rest) {
    int32_t four[R] = {};
    for (int r = 0; r < R; r++) std::memcpy(&four[r], a + r * lda, p.rest);
    step<Op, R, V>(sum, four, b);
  }
  int32_t* out = static_cast<int32_t*>(p.out);
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) _mm512_storeu_si512(out + r * p.ldo + 16 * v, sum[r][v]);
  }
}

template <class Op, int... I>
inline void choose(const Operands& p, int at, std::integer_sequence<int, I...>) {
  using Tile = void (*)(const Operands&);
  static constexpr Tile TILES[] = {tile<Op, I / WIDE + 1, I % WIDE + 1>...};
  TILES[at](p);
}

// rows 1 .. 6, vectors 1 .. 4
template <class Op>
inline void product(const Operands& p, int rows, int vectors) {
  choose<Op>(p, (rows - 1) * WIDE + vectors - 1, std::make_integer_sequence<int, ROWS * WIDE>());
}

}  // namespace qpass
