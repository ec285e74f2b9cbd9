// Attention on integers and layer norms, AVX-512 VNNI.
#include <cstring>

#include "vector512.h"

namespace tutelage {
namespace {

constexpr int kQueries = 8;

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where the operands of one head lie: keys in groups of 16 with 4 features a lane and 128 added,
// values with 4 tokens a lane, both padded with what counts as zero.
struct Layout {
  int64_t quads, groups, token_quads, value_groups;
  int64_t key, value, query, key_scale, value_scale, query_scale, query_sum, scores, map, bytes;
  Layout(int64_t tokens, int64_t width) {
    quads = up(width, 4) / 4;
    groups = up(tokens, 16) / 16;
    token_quads = up(tokens, 4) / 4;
    value_groups = up(width, 16) / 16;
    int64_t at = 0;
    const auto take = [&](int64_t size) { const int64_t start = at; at += up(size, 64); return start; };
    key = take(groups * quads * 64);
    value = take(token_quads * value_groups * 64);
    query = take(up(tokens, kQueries) * quads * 4);
    key_scale = take(groups * 64);
    value_scale = take(groups * 64);
    query_scale = take(up(tokens, kQueries) * 4);
    query_sum = take(up(tokens, kQueries) * 4);
    scores = take(kQueries * groups * 64);
    map = take(kQueries * groups * 16);
    bytes = at;
  }
};

inline __m512i broadcast4(const void* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  return _mm512_set1_epi32(quad);
}

void pack(const Head& h, const Levels& levels, const Layout& at, char* base) {
  auto* keys = reinterpret_cast<uint8_t*>(base + at.key);
  auto* values = reinterpret_cast<int8_t*>(base + at.value);
  auto* queries = reinterpret_cast<int8_t*>(base + at.query);
  auto* key_scale = reinterpret_cast<float*>(base + at.key_scale);
  auto* value_scale = reinterpret_cast<float*>(base + at.value_scale);
  auto* query_scale = reinterpret_cast<float*>(base + at.query_scale);
  auto* query_sum = reinterpret_cast<int32_t*>(base + at.query_sum);
  const int64_t depth = 4 * at.quads, lanes = 16 * at.value_groups;
  alignas(64) int8_t row[4][512];
  int32_t ignored;
  std::memset(queries, 0, up(h.tokens, kQueries) * depth);
  for (int64_t t = 0; t < 16 * at.groups; ++t) {
    uint8_t* to = keys + (t / 16) * at.quads * 64 + (t % 16) * 4;
    if (t < h.tokens) {
      quantize_row512(h.key + t * h.stride, h.width, up(h.width, 16), levels.key, row[0],
                      key_scale + t, &ignored);
    } else {
      std::memset(row[0], 0, sizeof row[0]);
      key_scale[t] = value_scale[t] = 0.0f;
    }
    for (int64_t q = 0; q < at.quads; ++q) {
      uint32_t quad;
      std::memcpy(&quad, row[0] + 4 * q, 4);
      quad ^= 0x80808080u;
      std::memcpy(to + 64 * q, &quad, 4);
    }
  }
  for (int64_t q = 0; q < at.token_quads; ++q) {
    for (int i = 0; i < 4; ++i) {
      const int64_t t = 4 * q + i;
      if (t < h.tokens)
        quantize_row512(h.value + t * h.stride, h.width, lanes, levels.value, row[i],
                        value_scale + t, &ignored);
      else
        std::memset(row[i], 0, lanes);
    }
    for (int64_t g = 0; g < at.value_groups; ++g) {
      const auto load = [&](int i) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(row[i] + 16 * g));
      };
      const __m128i a = _mm_unpacklo_epi8(load(0), load(1)), b = _mm_unpackhi_epi8(load(0), load(1));
      const __m128i c = _mm_unpacklo_epi8(load(2), load(3)), d = _mm_unpackhi_epi8(load(2), load(3));
      auto* to = reinterpret_cast<__m128i*>(values + (q * at.value_groups + g) * 64);
      _mm_store_si128(to, _mm_unpacklo_epi16(a, c));
      _mm_store_si128(to + 1, _mm_unpackhi_epi16(a, c));
      _mm_store_si128(to + 2, _mm_unpacklo_epi16(b, d));
      _mm_store_si128(to + 3, _mm_unpackhi_epi16(b, d));
    }
  }
  for (int64_t t = 0; t < h.tokens; ++t) {
    quantize_row512(h.query + t * h.stride, h.width, up(h.width, 16), levels.query, row[0],
                    query_scale + t, query_sum + t);
    std::memcpy(queries + t * depth, row[0], depth);
    query_scale[t] = query_scale[t] * h.scaling;
  }
  for (int64_t t = h.tokens; t < up(h.tokens, kQueries); ++t) query_scale[t] = 0.0f, query_sum[t] = 0;
}

inline __mmask16 alive(const Head& h, int64_t group) { return tail_mask(h.tokens - 16 * group); }

// Scores of 8 queries; padding of the keys gets what the softmax makes zero of.
void score(const Head& h, const Layout& at, char* base, int64_t first, int count) {
  const auto* keys = reinterpret_cast<const uint8_t*>(base + at.key);
  const auto* queries = reinterpret_cast<const int8_t*>(base + at.query) + first * 4 * at.quads;
  const auto* key_scale = reinterpret_cast<const float*>(base + at.key_scale);
  const auto* query_scale = reinterpret_cast<const float*>(base + at.query_scale) + first;
  const auto* query_sum = reinterpret_cast<const int32_t*>(base + at.query_sum) + first;
  auto* scores = reinterpret_cast<float*>(base + at.scores);
  for (int64_t g = 0; g < at.groups; ++g) {
    __m512i acc[kQueries];
#pragma GCC unroll 8
    for (int r = 0; r < kQueries; ++r) acc[r] = _mm512_set1_epi32(-128 * query_sum[r]);
    for (int64_t q = 0; q < at.quads; ++q) {
      const __m512i k = _mm512_load_si512(keys + (g * at.quads + q) * 64);
#pragma GCC unroll 8
      for (int r = 0; r < kQueries; ++r)
        acc[r] = _mm512_dpbusd_epi32(acc[r], k, broadcast4(queries + (r * at.quads + q) * 4));
    }
    const __m512 ks = _mm512_load_ps(key_scale + 16 * g);
    const __mmask16 mask = alive(h, g);
    for (int r = 0; r < count; ++r) {
      __m512 s = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r]), _mm512_set1_ps(query_scale[r]));
      s = _mm512_mul_ps(s, ks);
      if (h.mask != nullptr)
        s = _mm512_add_ps(
            s, _mm512_maskz_loadu_ps(mask, h.mask + (first + r) * h.mask_stride + 16 * g));
      s = _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), mask, s);
      _mm512_store_ps(scores + r * 16 * at.groups + 16 * g, s);
    }
  }
}

// Softmax of a row of scores, times the values' scales, quantized without sign; its scale.
float map_row(const Head& h, const Layout& at, float* scores, const float* value_scale, float top,
              uint8_t* codes) {
  __m512 largest = _mm512_load_ps(scores);
  __mmask16 odd = 0;
  for (int64_t g = 0; g < at.groups; ++g) {
    const __m512 s = _mm512_load_ps(scores + 16 * g);
    odd |= _mm512_cmp_ps_mask(s, s, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, s);
  }
  const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t g = 0; g < at.groups; ++g) {
    const __m512 e = _mm512_maskz_mov_ps(
        alive(h, g), exp512(_mm512_sub_ps(_mm512_load_ps(scores + 16 * g), shift)));
    sum = _mm512_add_ps(sum, e);
    _mm512_store_ps(scores + 16 * g, e);
  }
  const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
  __m512 most = _mm512_setzero_ps();
  for (int64_t g = 0; g < at.groups; ++g) {
    __m512 p = _mm512_mul_ps(_mm512_load_ps(scores + 16 * g), inverse);
    p = _mm512_mul_ps(p, _mm512_load_ps(value_scale + 16 * g));
    odd |= _mm512_cmp_ps_mask(p, p, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, p);
    _mm512_store_ps(scores + 16 * g, p);
  }
  const float scale = odd ? std::numeric_limits<float>::quiet_NaN()
                          : usable_scale(_mm512_reduce_max_ps(most), top);
  if (!std::isfinite(scale)) {
    std::memset(codes, 0, 16 * at.groups);
    return scale;
  }
  const Divider divide(scale);
  for (int64_t g = 0; g < at.groups; ++g)
    _mm_store_si128(reinterpret_cast<__m128i*>(codes + 16 * g),
                    _mm512_cvtepi32_epi8(divide.round(_mm512_load_ps(scores + 16 * g))));
  return scale;
}

// Contexts of 8 queries from their maps, two groups of 16 features at a time.
void mix(const Head& h, const Layout& at, char* base, int64_t first, int count,
         const float* scale) {
  const auto* values = reinterpret_cast<const int8_t*>(base + at.value);
  const auto* map = reinterpret_cast<const uint8_t*>(base + at.map);
  for (int64_t g = 0; g < at.value_groups; g += 2) {
    const bool pair = g + 1 < at.value_groups;
    const int64_t second = pair ? 64 : 0;
    __m512i low[kQueries], high[kQueries];
#pragma GCC unroll 8
    for (int r = 0; r < kQueries; ++r) low[r] = high[r] = _mm512_setzero_si512();
    for (int64_t q = 0; q < at.token_quads; ++q) {
      const int8_t* v = values + (q * at.value_groups + g) * 64;
      const __m512i a = _mm512_load_si512(v), b = _mm512_load_si512(v + second);
#pragma GCC unroll 8
      for (int r = 0; r < kQueries; ++r) {
        const __m512i p = broadcast4(map + r * 16 * at.groups + 4 * q);
        low[r] = _mm512_dpbusd_epi32(low[r], p, a);
        high[r] = _mm512_dpbusd_epi32(high[r], p, b);
      }
    }
    for (int r = 0; r < count; ++r) {
      float* to = h.context + (first + r) * h.stride + 16 * g;
      const __m512 s = _mm512_set1_ps(scale[r]);
      _mm512_mask_storeu_ps(to, tail_mask(h.width - 16 * g),
                            _mm512_mul_ps(_mm512_cvtepi32_ps(low[r]), s));
      if (pair)
        _mm512_mask_storeu_ps(to + 16, tail_mask(h.width - 16 * g - 16),
                              _mm512_mul_ps(_mm512_cvtepi32_ps(high[r]), s));
    }
  }
}

void attend(const Head& h, const Levels& levels, void* scratch) {
  const Layout at(h.tokens, h.width);
  auto* base = static_cast<char*>(scratch);
  pack(h, levels, at, base);
  auto* scores = reinterpret_cast<float*>(base + at.scores);
  auto* map = reinterpret_cast<uint8_t*>(base + at.map);
  const auto* value_scale = reinterpret_cast<const float*>(base + at.value_scale);
  float scale[kQueries];
  for (int64_t first = 0; first < h.tokens; first += kQueries) {
    const int count = static_cast<int>(h.tokens - first < kQueries ? h.tokens - first : kQueries);
    score(h, at, base, first, count);
    for (int r = 0; r < count; ++r)
      scale[r] = map_row(h, at, scores + r * 16 * at.groups, value_scale, levels.map,
                         map + r * 16 * at.groups);
    mix(h, at, base, first, count, scale);
  }
}

size_t head_bytes(int64_t tokens, int64_t width) {
  return static_cast<size_t>(Layout(tokens, width).bytes);
}

void norm(const float* x, const float* residual, const float* weight, const float* bias,
          float epsilon, int64_t width, float* sum, float* out) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += 16) {
    const __mmask16 mask = tail_mask(width - k);
    __m512 v = _mm512_maskz_loadu_ps(mask, x + k);
    if (residual != nullptr) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, residual + k));
    if (sum != nullptr) _mm512_mask_storeu_ps(sum + k, mask, v);
    total = _mm512_add_ps(total, v);
    if (out != nullptr) _mm512_mask_storeu_ps(out + k, mask, v);
  }
  if (out == nullptr) return;
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / static_cast<float>(width));
  __m512 square = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += 16) {
    const __mmask16 mask = tail_mask(width - k);
    const __m512 d = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, out + k), mean);
    square = _mm512_fmadd_ps(d, d, square);
  }
  const float variance = _mm512_reduce_add_ps(square) / static_cast<float>(width);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(variance + epsilon));
  for (int64_t k = 0; k < width; k += 16) {
    const __mmask16 mask = tail_mask(width - k);
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, out + k), mean), factor);
    v = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(mask, weight + k),
                        _mm512_maskz_loadu_ps(mask, bias + k));
    _mm512_mask_storeu_ps(out + k, mask, v);
  }
}

}  // namespace

const Block* block512() {
  static const Block block{head_bytes, attend, norm};
  return &block;
}

}  // namespace tutelage
