// AVX2: sums of 16 bits, which hold 32 steps of depth 4, are widened to 32 bits.
#include <immintrin.h>

#include "rows.h"
#include "scalar.h"

namespace tutelage {
namespace {

// 3 * 127 * 2 a step: 32 of them stay below 2^15.
constexpr int64_t kSteps = 32;

inline __m256i broadcast4(const int8_t* x) {
  int32_t quad;
  __builtin_memcpy(&quad, x, 4);
  return _mm256_set1_epi32(quad);
}

// R rows by 16 outputs: group j of a tile.
template <int R>
void block(const Weight& w, const Input& in, int64_t m, int64_t tile, int j,
           int32_t (*sums)[kTile]) {
  const uint8_t* panel = w.tile(tile);
  const int8_t* x = in.codes + m * w.depth;
  const __m128i shift = _mm_cvtsi32_si128(w.shift(tile, j));
  const __m256i mask = _mm256_set1_epi8(static_cast<char>(w.mask()));
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total[R][2];
  for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = _mm256_setzero_si256();
  const int64_t steps = w.depth / 4;
  for (int64_t first = 0; first < steps; first += kSteps) {
    const int64_t last = first + kSteps < steps ? first + kSteps : steps;
    __m256i acc[R][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (int64_t s = first; s < last; ++s) {
      const auto* lanes = reinterpret_cast<const __m256i*>(panel + 64 * s);
      const __m256i low = _mm256_and_si256(_mm256_srl_epi16(_mm256_loadu_si256(lanes), shift), mask);
      const __m256i high =
          _mm256_and_si256(_mm256_srl_epi16(_mm256_loadu_si256(lanes + 1), shift), mask);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256i quad = broadcast4(x + r * w.depth + 4 * s);
        acc[r][0] = _mm256_add_epi16(acc[r][0], _mm256_maddubs_epi16(low, quad));
        acc[r][1] = _mm256_add_epi16(acc[r][1], _mm256_maddubs_epi16(high, quad));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      for (int h = 0; h < 2; ++h)
        total[r][h] = _mm256_add_epi32(total[r][h], _mm256_madd_epi16(acc[r][h], ones));
  }
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[r] + kGroup * j + 8 * h), total[r][h]);
}

void gemm(const Weight& w, const Input& in, const Output& out, int64_t row, int64_t row_end,
          int64_t tile, int64_t tile_end) {
  int32_t sums[4][kTile];
  for (int64_t t = tile; t < tile_end; ++t)
    for (int64_t m = row; m < row_end; m += 4) {
      const int64_t rows = row_end - m < 4 ? row_end - m : 4;
      for (int j = 0; j < 4; ++j) {
        if (rows == 4) block<4>(w, in, m, t, j, sums);
        else
          for (int64_t r = 0; r < rows; ++r) block<1>(w, in, m + r, t, j, sums + r);
      }
      for (int64_t r = 0; r < rows; ++r) finish_scalar(w, in, out, m + r, t, sums[r]);
    }
}

inline float largest_of(__m256 v) {
  float lanes[8], largest = 0.0f;
  _mm256_storeu_ps(lanes, v);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

void quantize(const float* x, int64_t begin, int64_t end, int64_t width, int64_t depth, float top,
              int8_t* codes, float* scale, int32_t* sums) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int64_t m = begin; m < end; ++m) {
    const float* row = x + m * width;
    int8_t* to = codes + m * depth;
    __m256 largest = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 8 <= width; k += 8) {
      const __m256 a = _mm256_andnot_ps(sign, _mm256_loadu_ps(row + k));
      odd = _mm256_or_ps(odd, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
      largest = _mm256_max_ps(largest, a);
    }
    float top_of_row = largest_of(largest);
    bool nan = _mm256_movemask_ps(odd) != 0;
    for (; k < width; ++k) {
      const float a = std::fabs(row[k]);
      nan |= a != a;
      top_of_row = a > top_of_row ? a : top_of_row;
    }
    const float s =
        nan ? std::numeric_limits<float>::quiet_NaN() : usable_scale(top_of_row, top);
    scale[m] = s;
    int32_t total = 0;
    k = 0;
    if (std::isfinite(s)) {
      const __m256 divisor = _mm256_set1_ps(s);
      for (; k + 8 <= width; k += 8) {
        const __m256i q = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(row + k), divisor));
        int32_t lanes[8];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), q);
        for (int i = 0; i < 8; ++i) total += to[k + i] = static_cast<int8_t>(lanes[i]);
      }
      for (; k < width; ++k) total += to[k] = static_cast<int8_t>(std::nearbyint(row[k] / s));
    }
    for (; k < depth; ++k) to[k] = 0;
    sums[m] = total;
  }
}

}  // namespace

const Isa* avx2_isa() {
  static const Isa isa{"avx2", quantize, gemm, rows_of_this_file()};
  return &isa;
}

}  // namespace tutelage
