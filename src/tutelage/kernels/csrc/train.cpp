// Operators of a training step: quantization in one pass, scales after an exact product, squared
// errors. What they write into is allocated by the caller; their schemas are in _operators.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "runtime.h"

namespace tutelage {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kValuesAThread = 1 << 14;

template <class Body>
void over_rows(int64_t rows, int64_t width, Body body) {
  const int64_t grain = std::max<int64_t>(1, kValuesAThread / std::max<int64_t>(width, 1));
  if (rows <= grain) return body(0, rows);
  torch::stable::parallel_for(0, rows, grain, body);
}

void require_floats(const Tensor& x, const char* message) {
  require(x.scalar_type() == ScalarType::Float, message);
}

int64_t width_of(const Tensor& x) { return x.size(x.dim() - 1); }

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

// The rows of x, its last dimension left out.
Strides strides_of(const Tensor& x) {
  require(x.dim() >= 1 && x.dim() <= 4, "a tensor of rows has one to four dimensions");
  Strides found;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    const int64_t slot = d + 3 - (x.dim() - 1);
    found.size[slot] = x.size(d);
    found.stride[slot] = x.stride(d);
  }
  return found;
}

void require_codes(const Tensor& x, const Tensor& codes, const Tensor& scale) {
  require_floats(x, "the input must be float32");
  require(x.numel() == 0 || width_of(x) == 1 || x.stride(x.dim() - 1) == 1,
          "the last dimension must be contiguous");
  require(codes.is_contiguous() && codes.numel() == x.numel() && scale.is_contiguous() &&
              scale.scalar_type() == ScalarType::Float && scale.numel() == rows_of(x),
          "codes or scale do not fit the input");
  require(codes.scalar_type() == ScalarType::Char || codes.scalar_type() == ScalarType::Float,
          "codes are int8 or float32");
}

int8_t* bytes_of(const Tensor& codes) {
  return codes.scalar_type() == ScalarType::Char ? static_cast<int8_t*>(codes.mutable_data_ptr())
                                                 : nullptr;
}

float* floats_of(const Tensor& codes) {
  return codes.scalar_type() == ScalarType::Char ? nullptr
                                                 : static_cast<float*>(codes.mutable_data_ptr());
}

void quantize_uniform(Tensor x, std::optional<Tensor> factor, int64_t levels, bool has_sign,
                      Tensor codes, Tensor scale, int64_t isa) {
  require_codes(x, codes, scale);
  const bool bytes = codes.scalar_type() == ScalarType::Char;
  require(levels >= 1 && levels <= (bytes ? 127 : 255), "codes do not hold that many levels");
  UniformRows p{};
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.rows = strides_of(x);
  if (factor) {
    require_floats(*factor, "the factor must be float32");
    require(factor->dim() == x.dim(), "the factor does not fit the input");
    for (int64_t d = 0; d < x.dim(); ++d)
      require(factor->size(d) == x.size(d), "the factor does not fit the input");
    require(factor->numel() == 0 || width_of(x) == 1 || factor->stride(x.dim() - 1) == 1,
            "the last dimension of the factor must be contiguous");
    p.factor = static_cast<const float*>(factor->const_data_ptr());
    p.factor_rows = strides_of(*factor);
  }
  p.width = width_of(x);
  p.top = static_cast<float>(levels);
  p.has_sign = has_sign;
  p.bytes = bytes_of(codes);
  p.floats = floats_of(codes);
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  const Rows* rows = chosen(isa)->rows;
  over_rows(rows_of(x), p.width, [&](int64_t b, int64_t e) { rows->uniform(p, b, e); });
}

void quantize_weight(Tensor x, int64_t kind, double threshold, Tensor codes, Tensor scale,
                     int64_t isa) {
  require_codes(x, codes, scale);
  require(x.is_contiguous(), "the weight must be contiguous");
  require(kind >= 0 && kind <= 2, "no such kind of weight");
  WeightRows p{};
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.width = width_of(x);
  p.kind = static_cast<WeightKind>(kind);
  p.threshold = static_cast<float>(threshold);
  p.bytes = bytes_of(codes);
  p.floats = floats_of(codes);
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  const Rows* rows = chosen(isa)->rows;
  over_rows(rows_of(x), p.width, [&](int64_t b, int64_t e) { rows->weight(p, b, e); });
}

void scale_codes(Tensor codes, Tensor scale, Tensor out, int64_t isa) {
  require(codes.dim() >= 1 && codes.scalar_type() == ScalarType::Char && codes.is_contiguous(),
          "codes must be contiguous int8");
  const int64_t count = rows_of(codes), width = width_of(codes);
  require_floats(scale, "the scale must be float32");
  require_floats(out, "the result is float32");
  require(scale.is_contiguous() && (scale.numel() == count || scale.numel() == 1),
          "the scale does not fit the codes");
  require(out.is_contiguous() && out.numel() == codes.numel(), "the result does not fit");
  const auto* from = static_cast<const int8_t*>(codes.const_data_ptr());
  const auto* factor = static_cast<const float*>(scale.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const Rows* rows = chosen(isa)->rows;
  over_rows(count, width, [&](int64_t b, int64_t e) {
    rows->scale_codes(from, factor, scale.numel() > 1, width, to, b, e);
  });
}

void scale_sums(Tensor sums, Tensor row_scale, Tensor column_scale, std::optional<Tensor> bias,
                int64_t isa) {
  require(sums.dim() == 2 && sums.scalar_type() == ScalarType::Int && sums.is_contiguous(),
          "sums must be a contiguous int32 matrix");
  const int64_t count = sums.size(0), width = sums.size(1);
  for (const Tensor* scale : {&row_scale, &column_scale}) {
    require_floats(*scale, "scales must be float32");
    require(scale->is_contiguous(), "scales must be contiguous");
  }
  require(row_scale.numel() == count || row_scale.numel() == 1, "a scale does not fit the sums");
  require(column_scale.numel() == width || column_scale.numel() == 1,
          "a scale does not fit the sums");
  require(!bias || (bias->scalar_type() == ScalarType::Float && bias->is_contiguous() &&
                    bias->numel() == width),
          "the bias does not fit the sums");
  const SumRows p{static_cast<int32_t*>(sums.mutable_data_ptr()),
                  width,
                  static_cast<const float*>(row_scale.const_data_ptr()),
                  row_scale.numel() > 1,
                  static_cast<const float*>(column_scale.const_data_ptr()),
                  column_scale.numel() > 1,
                  bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr};
  const Rows* rows = chosen(isa)->rows;
  over_rows(count, width, [&](int64_t b, int64_t e) { rows->scale_sums(p, b, e); });
}

ErrorRows error_rows(const Tensor& own, const Tensor& other, const std::optional<Tensor>& mask) {
  require_floats(own, "signals must be float32");
  require_floats(other, "signals must be float32");
  require(own.dim() >= 1 && own.is_contiguous() && other.is_contiguous() &&
              own.numel() == other.numel(),
          "signals must be contiguous and of one shape");
  ErrorRows p{};
  p.own = static_cast<const float*>(own.const_data_ptr());
  p.other = static_cast<const float*>(other.const_data_ptr());
  p.width = width_of(own);
  if (mask) {
    require_floats(*mask, "the mask must be float32");
    require(mask->dim() == own.dim(), "the mask does not fit the signals");
    for (int64_t d = 0; d < own.dim(); ++d)
      require(mask->size(d) == own.size(d), "the mask does not fit the signals");
    const int64_t last = mask->stride(own.dim() - 1);
    require(p.width == 1 || last == 0 || last == 1, "the mask must be contiguous or constant");
    p.mask = static_cast<const float*>(mask->const_data_ptr());
    p.mask_rows = strides_of(*mask);
    p.mask_per_value = p.width > 1 && last == 1;
  }
  return p;
}

void squared_error(Tensor own, Tensor other, std::optional<Tensor> mask, Tensor out, int64_t isa) {
  ErrorRows p = error_rows(own, other, mask);
  require_floats(out, "the result is float32");
  require(out.numel() == 1, "the result is one number");
  std::vector<double> sums(rows_of(own));
  p.sums = sums.data();
  const Rows* rows = chosen(isa)->rows;
  over_rows(rows_of(own), p.width, [&](int64_t b, int64_t e) { rows->squared(p, b, e); });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(total);
}

void squared_error_backward(Tensor own, Tensor other, std::optional<Tensor> mask, Tensor gain,
                            Tensor out, int64_t isa) {
  ErrorRows p = error_rows(own, other, mask);
  require_floats(gain, "the gain must be float32");
  require_floats(out, "the result is float32");
  require(gain.numel() == 1 && out.is_contiguous() && out.numel() == own.numel(),
          "gain or result do not fit the signals");
  p.gain = static_cast<const float*>(gain.const_data_ptr());
  p.out = static_cast<float*>(out.mutable_data_ptr());
  const Rows* rows = chosen(isa)->rows;
  over_rows(rows_of(own), p.width, [&](int64_t b, int64_t e) { rows->squared(p, b, e); });
}

}  // namespace
}  // namespace tutelage

STABLE_TORCH_LIBRARY_IMPL(tutelage, CPU, m) {
  m.impl("quantize_uniform", TORCH_BOX(&tutelage::quantize_uniform));
  m.impl("quantize_weight", TORCH_BOX(&tutelage::quantize_weight));
  m.impl("scale_codes", TORCH_BOX(&tutelage::scale_codes));
  m.impl("scale_sums", TORCH_BOX(&tutelage::scale_sums));
  m.impl("squared_error", TORCH_BOX(&tutelage::squared_error));
  m.impl("squared_error_backward", TORCH_BOX(&tutelage::squared_error_backward));
}
