// AVX-512 pieces that the VNNI and AMX paths share. Internal linkage: every file that includes it
// is compiled for other instructions.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace tutelage {
namespace {

inline __m512 exp512(__m512 x) {
  // exp(x) = 2^n exp(r), |r| <= log(2) / 2, x >= -87.
  x = _mm512_max_ps(_mm512_set1_ps(-87.33654f), x);  // NaN stays: the second operand is returned
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040.0f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Abramowitz and Stegun 7.1.26, |error| < 1.5e-7.
inline __m512 erf512(__m512 x) {
  const __m512 a = _mm512_abs_ps(x);
  const __m512 d = _mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f));
  __m512 t = _mm512_rcp14_ps(d);
  t = _mm512_mul_ps(t, _mm512_fnmadd_ps(d, t, _mm512_set1_ps(2.0f)));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  p = _mm512_mul_ps(p, t);
  const __m512 e = exp512(_mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), a), a));
  const __m512 y = _mm512_fnmadd_ps(p, e, _mm512_set1_ps(1.0f));
  return _mm512_castsi512_ps(_mm512_or_si512(
      _mm512_castps_si512(y),
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN))));
}

inline __m512 activate512(__m512 y, Activation activation) {
  if (activation == Activation::none) return y;
  if (activation == Activation::relu) return _mm512_max_ps(_mm512_setzero_ps(), y);
  const __m512 half = _mm512_mul_ps(y, _mm512_set1_ps(0.5f));
  const __m512 one = _mm512_set1_ps(1.0f);
  if (activation == Activation::gelu) {
    const __m512 e = erf512(_mm512_mul_ps(y, _mm512_set1_ps(0.70710678118654752440f)));
    return _mm512_mul_ps(half, _mm512_add_ps(one, e));
  }
  // tanh(u) = 1 - 2 / (1 + exp(2 u)), u where exp neither overflows nor matters.
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(y, y), y);
  __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), y);
  u = _mm512_mul_ps(u, _mm512_set1_ps(2.0f * 0.79788456080286535588f));
  u = _mm512_min_ps(_mm512_set1_ps(40.0f), u);
  const __m512 e = exp512(u);
  const __m512 tanh = _mm512_sub_ps(
      one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(one, e)));
  return _mm512_mul_ps(half, _mm512_add_ps(one, tanh));
}

// round(x / s), correctly rounded before it is rounded to an integer: Markstein's correction, twice,
// of the product with the rounded reciprocal. A division of 16 costs as much as five of these.
struct Divider {
  __m512 scale, reciprocal;
  explicit Divider(float s) : scale(_mm512_set1_ps(s)), reciprocal(_mm512_set1_ps(1.0f / s)) {}
  __m512i round(__m512 x) const {
    __m512 q = _mm512_mul_ps(x, reciprocal);
    q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, scale, x), reciprocal, q);
    q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, scale, x), reciprocal, q);
    return _mm512_cvtps_epi32(q);
  }
};

inline __mmask16 tail_mask(int64_t left) {
  return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

inline void quantize_row512(const float* x, int64_t width, int64_t depth, float top,
                            int8_t* codes, float* scale, int32_t* sum) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 odd = 0;
  int64_t k = 0;
  for (; k + 16 <= width; k += 16) {
    const __m512 a = _mm512_abs_ps(_mm512_loadu_ps(x + k));
    odd |= _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, a);
  }
  if (k < width) {
    const __m512 a = _mm512_abs_ps(_mm512_maskz_loadu_ps(tail_mask(width - k), x + k));
    odd |= _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, a);
  }
  const float s = odd ? std::numeric_limits<float>::quiet_NaN()
                      : usable_scale(_mm512_reduce_max_ps(largest), top);
  *scale = s;
  if (!std::isfinite(s)) {
    for (k = 0; k < depth; ++k) codes[k] = 0;
    *sum = 0;
    return;
  }
  const Divider divide(s);
  __m512i total = _mm512_setzero_si512();
  for (k = 0; k + 16 <= width; k += 16) {
    const __m512i q = divide.round(_mm512_loadu_ps(x + k));
    total = _mm512_add_epi32(total, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtepi32_epi8(q));
  }
  for (; k < depth; k += 16) {
    const __mmask16 mask = k < width ? tail_mask(width - k) : 0;
    const __m512i q = divide.round(_mm512_maskz_loadu_ps(mask, x + k));
    total = _mm512_add_epi32(total, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtepi32_epi8(q));
  }
  *sum = _mm512_reduce_add_epi32(total);
}

inline void quantize512(const float* x, int64_t begin, int64_t end, int64_t width, int64_t depth,
                        float top, int8_t* codes, float* scale, int32_t* sums) {
  for (int64_t m = begin; m < end; ++m)
    quantize_row512(x + m * width, width, depth, top, codes + m * depth, scale + m, sums + m);
}

// Scales, bias and activation of 16 exact sums, stored up to the end of the row.
inline void finish512(const Weight& w, const Output& out, float input_scale, int64_t m, int64_t n,
                      __m512i total) {
  if (n >= w.rows) return;
  const __mmask16 mask = tail_mask(w.rows - n);
  __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(input_scale));
  y = _mm512_mul_ps(y, w.scale_per_row ? _mm512_maskz_loadu_ps(mask, w.scale + n)
                                       : _mm512_set1_ps(w.scale[0]));
  if (w.bias != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, w.bias + n));
  _mm512_mask_storeu_ps(out.values + m * out.stride + n, mask, activate512(y, out.activation));
}

}  // namespace
}  // namespace tutelage
