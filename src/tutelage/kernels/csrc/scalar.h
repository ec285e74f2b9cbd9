// Scalar pieces that other paths use for their ends.
#pragma once

#include <cmath>
#include <limits>

#include "kernels.h"

namespace tutelage {

inline float activate(float y, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return y * 0.5f * (1.0f + std::erf(y * 0.70710678118654752440f));
    case Activation::gelu_tanh:
      return 0.5f * y *
             (1.0f + std::tanh(0.79788456080286535588f * (y + 0.044715f * y * y * y)));
    case Activation::relu:
      return y > 0.0f ? y : (y == y ? 0.0f : y);
    default:
      return y;
  }
}

// The scale of a row whose largest magnitude is given; codes of a row whose scale is not finite
// are zero, so that the products are NaN.
inline float usable_scale(float largest, float top) {
  const float scale = largest / top;
  return scale < std::numeric_limits<float>::min() ? 1.0f : scale;
}

inline void quantize_row_scalar(const float* x, int64_t width, int64_t depth, float top,
                                int8_t* codes, float* scale, int32_t* sum) {
  float largest = 0.0f;
  bool nan = false;
  for (int64_t k = 0; k < width; ++k) {
    const float a = std::fabs(x[k]);
    nan |= a != a;
    largest = a > largest ? a : largest;
  }
  const float s = nan ? std::numeric_limits<float>::quiet_NaN() : usable_scale(largest, top);
  int32_t total = 0;
  for (int64_t k = 0; k < depth; ++k) {
    int8_t code = 0;
    if (k < width && std::isfinite(s)) code = static_cast<int8_t>(std::nearbyint(x[k] / s));
    codes[k] = code;
    total += code;
  }
  *scale = s;
  *sum = total;
}

inline void quantize_scalar(const float* x, int64_t begin, int64_t end, int64_t width,
                            int64_t depth, float top, int8_t* codes, float* scale,
                            int32_t* sums) {
  for (int64_t m = begin; m < end; ++m)
    quantize_row_scalar(x + m * width, width, depth, top, codes + m * depth, scale + m, sums + m);
}

// sums: of index times code for the 64 outputs of a tile.
inline void finish_scalar(const Weight& w, const Input& in, const Output& out, int64_t m,
                          int64_t t, const int32_t* sums) {
  for (int i = 0; i < kTile && t * kTile + i < w.rows; ++i) {
    const int64_t n = t * kTile + i;
    const int32_t total = w.step * sums[i] + w.lo * in.sums[m];
    float y = static_cast<float>(total) * in.scale[m];
    y = y * w.scale[w.scale_per_row ? n : 0];
    if (w.bias != nullptr) y = y + w.bias[n];
    out.values[m * out.stride + n] = activate(y, out.activation);
  }
}

}  // namespace tutelage
