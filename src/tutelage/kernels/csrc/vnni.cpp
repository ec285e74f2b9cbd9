// AVX-512 VNNI. Masked codes are the unsigned operand as they stand: group j then counts
// 2^shift(j) times too much, which one exact shift undoes at the end.
#include <utility>

#include "vector512.h"

namespace tutelage {
namespace {

inline __m512i broadcast4(const int8_t* x) {
  int32_t quad;
  __builtin_memcpy(&quad, x, 4);
  return _mm512_set1_epi32(quad);
}

inline void finish_group(const Weight& w, const Input& in, const Output& out, int64_t m,
                         int64_t tile, int j, __m512i acc) {
  acc = _mm512_sra_epi32(acc, _mm_cvtsi32_si128(w.shift(tile, j)));
  const __m512i total =
      _mm512_add_epi32(_mm512_mullo_epi32(acc, _mm512_set1_epi32(w.step)),
                       _mm512_set1_epi32(w.lo * in.sums[m]));
  finish512(w, out, in.scale[m], m, tile * kTile + j * kGroup, total);
}

// In assembly, lest GCC 12 copy accumulators between registers in the loop.
[[gnu::always_inline]] inline void dot4(__m512i& acc, __m512i codes, __m512i quad) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(quad));
}

// f(0), ..., f(N - 1) with constants, so that arrays indexed by them stay in registers.
template <class F, int... I>
[[gnu::always_inline]] inline void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
[[gnu::always_inline]] inline void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

// R rows by G groups; a row's accumulators are doubled where they are few, to hide latency.
template <int R, int G>
void block(const Weight& w, const Input& in, const Output& out, int64_t m, int64_t tile) {
  constexpr int U = R * G <= 8 ? 2 : 1;
  const uint8_t* panel = w.tile(tile);
  const int64_t depth = w.depth;
  for (int first = 0; first < 4; first += G) {
    const int8_t* x = in.codes + m * depth;
    const int8_t* end = x + depth;
    const uint8_t* lane = panel;
    __m512i mask[G], acc[U][R][G];
    unroll<G>([&](auto g) __attribute__((always_inline)) {
      mask[g] = _mm512_set1_epi8(static_cast<char>(w.mask() << w.shift(tile, first + g)));
      unroll<U>([&](auto u) __attribute__((always_inline)) {
        unroll<R>([&](auto r) __attribute__((always_inline)) {
          acc[u][r][g] = _mm512_setzero_si512();
        });
      });
    });
    for (; x < end; x += 4 * U, lane += 64 * U) {
      unroll<U>([&](auto u) __attribute__((always_inline)) {
        const __m512i lanes = _mm512_loadu_si512(lane + 64 * u);
        __m512i codes[G];
        unroll<G>([&](auto g) __attribute__((always_inline)) {
          codes[g] = _mm512_and_si512(lanes, mask[g]);
        });
        unroll<R>([&](auto r) __attribute__((always_inline)) {
          const __m512i quad = broadcast4(x + r * depth + 4 * u);
          unroll<G>([&](auto g) __attribute__((always_inline)) {
            dot4(acc[u][r][g], codes[g], quad);
          });
        });
      });
    }
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      unroll<G>([&](auto g) __attribute__((always_inline)) {
        __m512i sum = acc[0][r][g];
        if (U == 2) sum = _mm512_add_epi32(sum, acc[U - 1][r][g]);
        finish_group(w, in, out, m + r, tile, first + g, sum);
      });
    });
  }
}

using Block = void (*)(const Weight&, const Input&, const Output&, int64_t, int64_t);
constexpr int kRows = 12;
constexpr Block kBlocks[kRows] = {
    block<1, 4>, block<2, 4>, block<3, 4>, block<4, 4>,  block<5, 4>,  block<6, 4>,
    block<7, 2>, block<8, 2>, block<9, 2>, block<10, 2>, block<11, 2>, block<12, 2>,
};

void gemm(const Weight& w, const Input& in, const Output& out, int64_t row, int64_t row_end,
          int64_t tile, int64_t tile_end) {
  // As few blocks as hold the rows, of nearly equal size.
  const int64_t blocks = (row_end - row + kRows - 1) / kRows;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = row + (row_end - row) * b / blocks;
    const int64_t end = row + (row_end - row) * (b + 1) / blocks;
    for (int64_t t = tile; t < tile_end; ++t) kBlocks[end - begin - 1](w, in, out, begin, t);
  }
}

}  // namespace

const Isa* vnni_isa() {
  static const Isa isa{"avx512_vnni", quantize512, gemm, rows512()};
  return &isa;
}

}  // namespace tutelage
