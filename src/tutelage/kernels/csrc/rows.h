// Passes of a training step over rows: each reads its operands once and writes its result once.
// Sixteen lanes at a time in vectors of the compiler's; every file that includes this is compiled
// for other instructions, with the same operations in the same order.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace tutelage {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef float HalfFloats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
constexpr int kLanes = 16;

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Floats load(const int8_t* from) {
  Bytes v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Floats);
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// Of integers from -128 to 127.
inline void store(int8_t* to, Floats v) {
  const Bytes bytes = __builtin_convertvector(__builtin_convertvector(v, Ints), Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
}

inline Floats all(float value) {
  return Floats{} + value;
}

inline Floats magnitude(Floats v) {
  Ints bits;
  std::memcpy(&bits, &v, sizeof v);
  bits &= 0x7fffffff;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Half to even, for |v| < 2^22: float32's own rounding where one unit in the last place is 1.
inline Floats round_even(Floats v) { return (v + 12582912.0f) - 12582912.0f; }

// Calls on(k, lanes): sixteen values of a row at a time, then the rest of it.
template <class On>
inline void each_lanes(int64_t width, On on) {
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) on(k, kLanes);
  if (k < width) on(k, static_cast<int>(width - k));
}

template <class T>
inline Floats load_some(const T* from, int lanes) {
  if (lanes == kLanes) return load(from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, lanes * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_some(T* to, Floats v, int lanes) {
  if (lanes == kLanes) return store(to, v);
  T padded[kLanes];
  store(padded, v);
  std::memcpy(to, padded, lanes * sizeof(T));
}

struct DoubleSum {
  Doubles low{}, high{};
  void add(Floats v) {
    HalfFloats halves[2];
    std::memcpy(halves, &v, sizeof v);
    low += __builtin_convertvector(halves[0], Doubles);
    high += __builtin_convertvector(halves[1], Doubles);
  }
  double total() const {
    const Doubles both = low + high;
    double sum = 0.0;
    for (int i = 0; i < 8; ++i) sum += both[i];
    return sum;
  }
};

template <class Code>
inline void uniform_row(const float* x, const float* factor, int64_t width, float top,
                        bool has_sign, Code* codes, float* scale) {
  Floats largest{};
  Ints odd{};
  each_lanes(width, [&](int64_t k, int lanes) {
    Floats v = load_some(x + k, lanes);
    if (factor != nullptr) v = v * load_some(factor + k, lanes);
    odd |= v != v;
    if (has_sign) v = magnitude(v);
    largest = v > largest ? v : largest;
  });
  float most = 0.0f;
  bool nan = false;
  for (int i = 0; i < kLanes; ++i) {
    most = largest[i] > most ? largest[i] : most;
    nan |= odd[i] != 0;
  }
  float s = most / top;
  if (s < std::numeric_limits<float>::min()) s = 1.0f;
  if (nan) s = std::numeric_limits<float>::quiet_NaN();
  *scale = s;
  if (!std::isfinite(s)) {
    each_lanes(width, [&](int64_t k, int lanes) { store_some(codes + k, Floats{}, lanes); });
    return;
  }
  const Floats divisor = all(s);
  each_lanes(width, [&](int64_t k, int lanes) {
    Floats v = load_some(x + k, lanes);
    if (factor != nullptr) v = v * load_some(factor + k, lanes);
    v = round_even(v / divisor);
    if (!has_sign) v = v > 0.0f ? v : Floats{};
    store_some(codes + k, v, lanes);
  });
}

template <class Code>
inline void weight_row(const float* x, int64_t width, WeightKind kind, float threshold,
                       Code* codes, float* scale) {
  DoubleSum sum;
  each_lanes(width, [&](int64_t k, int lanes) { sum.add(magnitude(load_some(x + k, lanes))); });
  const float mean = static_cast<float>(sum.total()) / static_cast<float>(width > 0 ? width : 1);
  const Floats one = all(1.0f), zero{};
  if (kind == WeightKind::binary) {
    each_lanes(width, [&](int64_t k, int lanes) {
      store_some(codes + k, load_some(x + k, lanes) < zero ? -one : one, lanes);
    });
    *scale = mean;
    return;
  }
  const bool ternary = kind == WeightKind::ternary;
  const Floats least = all(mean * threshold);
  DoubleSum kept;
  Floats outer{};  // how many are above the threshold, exact up to 2^24 a lane
  each_lanes(width, [&](int64_t k, int lanes) {
    const Floats v = load_some(x + k, lanes), m = magnitude(v);
    const Ints above = m > least;
    const Floats level = ternary ? (above ? one : zero) : (above ? all(3.0f) : one);
    kept.add(m * level);
    outer += above ? one : zero;
    store_some(codes + k, v < zero ? zero - level : level, lanes);
  });
  double above = 0.0;
  for (int i = 0; i < kLanes; ++i) above += outer[i];
  const auto squares = static_cast<float>(ternary ? above : width + 8.0 * above);
  const float best = static_cast<float>(kept.total()) / (squares > 1.0f ? squares : 1.0f);
  *scale = best + mean * 0.0f;
}

inline void uniform_rows(const UniformRows& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* x = p.x + p.rows.offset(r);
    const float* factor = p.factor == nullptr ? nullptr : p.factor + p.factor_rows.offset(r);
    if (p.bytes != nullptr)
      uniform_row(x, factor, p.width, p.top, p.has_sign, p.bytes + r * p.width, p.scale + r);
    else
      uniform_row(x, factor, p.width, p.top, p.has_sign, p.floats + r * p.width, p.scale + r);
  }
}

inline void weight_rows(const WeightRows& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* x = p.x + r * p.width;
    if (p.bytes != nullptr)
      weight_row(x, p.width, p.kind, p.threshold, p.bytes + r * p.width, p.scale + r);
    else
      weight_row(x, p.width, p.kind, p.threshold, p.floats + r * p.width, p.scale + r);
  }
}

inline void scale_codes(const int8_t* codes, const float* scale, bool per_row, int64_t width,
                        float* out, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const Floats s = all(scale[per_row ? r : 0]);
    each_lanes(width, [&](int64_t k, int lanes) {
      const int64_t at = r * width + k;
      store_some(out + at, load_some(codes + at, lanes) * s, lanes);
    });
  }
}

inline void scale_sums(const SumRows& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const Floats row = all(p.row_scale[p.per_row ? r : 0]);
    each_lanes(p.width, [&](int64_t k, int lanes) {
      const int64_t at = r * p.width + k;
      Ints sums{};
      std::memcpy(&sums, p.sums + at, lanes * sizeof(int32_t));
      Floats y = __builtin_convertvector(sums, Floats) * row;
      y = y * (p.per_column ? load_some(p.column_scale + k, lanes) : all(p.column_scale[0]));
      if (p.bias != nullptr) y = y + load_some(p.bias + k, lanes);
      std::memcpy(p.sums + at, &y, lanes * sizeof(float));
    });
  }
}

inline void squared_rows(const ErrorRows& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* mask = p.mask == nullptr ? nullptr : p.mask + p.mask_rows.offset(r);
    const Floats whole = all(mask != nullptr && !p.mask_per_value ? mask[0] : 1.0f);
    const Floats gain = all(p.out == nullptr ? 0.0f : p.gain[0]);
    DoubleSum sum;
    each_lanes(p.width, [&](int64_t k, int lanes) {
      const int64_t at = r * p.width + k;
      Floats d = load_some(p.own + at, lanes) - load_some(p.other + at, lanes);
      if (mask != nullptr) d = d * (p.mask_per_value ? load_some(mask + k, lanes) : whole);
      if (p.out != nullptr) store_some(p.out + at, d * gain, lanes);
      else sum.add(d * d);
    });
    if (p.out == nullptr) p.sums[r] = sum.total();
  }
}

inline const Rows* rows_of_this_file() {
  static const Rows rows{uniform_rows, weight_rows, scale_codes, scale_sums, squared_rows};
  return &rows;
}

}  // namespace
}  // namespace tutelage
