// A whole Transformer encoder block: one call in place of some thirty.
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

enum { kQuery, kKey, kValue, kOutput, kUp, kDown, kLinears };

const float* floats(const Tensor& t, int64_t size, const char* message) {
  require(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == size, message);
  return static_cast<const float*>(t.const_data_ptr());
}

struct Plan {
  const Isa* isa;
  const Block* block;
  Weight linear[kLinears];
  const float* norm[4];  // weight and bias of the first, of the second
  int64_t hidden, inner, heads, width, tokens;
  bool pre_norm;
  Activation activation;
  float levels, epsilon[2], scaling;
  Levels attention;
  const float* mask;
  int64_t mask_batch, mask_row;

  int64_t attended() const { return heads * width; }
  int64_t deepest() const {
    return std::max(padded(inner), std::max(padded(hidden), padded(attended())));
  }
};

// Memory for some tokens: codes, scales, sums, Q K V, context or output, residual stream, inner.
struct Buffers {
  int8_t* codes;
  float *scale, *qkv, *context, *stream, *inner;
  int32_t* sums;
  static int64_t up(int64_t n) { return (n + 63) / 64 * 64; }
  static size_t size(const Plan& p, int64_t rows) {
    return up(rows * p.deepest()) + 2 * up(rows * 4) + up(rows * std::max(3 * p.attended(), p.hidden) * 4) +
           up(rows * std::max(p.attended(), p.hidden) * 4) +
           up(rows * p.hidden * 4) + up(rows * p.inner * 4);
  }
  Buffers(const Plan& p, int64_t rows, void* memory) {
    auto* at = static_cast<char*>(memory);
    const auto take = [&](int64_t bytes) { char* start = at; at += up(bytes); return start; };
    codes = reinterpret_cast<int8_t*>(take(rows * p.deepest()));
    scale = reinterpret_cast<float*>(take(rows * 4));
    sums = reinterpret_cast<int32_t*>(take(rows * 4));
    const int64_t wide = std::max(p.attended(), p.hidden);
    qkv = reinterpret_cast<float*>(take(rows * std::max(3 * p.attended(), p.hidden) * 4));
    context = reinterpret_cast<float*>(take(rows * wide * 4));
    stream = reinterpret_cast<float*>(take(rows * p.hidden * 4));
    inner = reinterpret_cast<float*>(take(rows * p.inner * 4));
  }
};

template <class F>
void each(bool parallel, int64_t count, int64_t grain, const F& f) {
  if (parallel) torch::stable::parallel_for(0, count, grain, f);
  else f(0, count);
}

Scratch& head_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Some whole sequences, from x to out.
void run(const Plan& p, const float* x, float* out, int64_t first, int64_t sequences, void* memory,
         bool parallel) {
  const int64_t rows = sequences * p.tokens, h = p.hidden, a = p.attended();
  const Buffers b(p, rows, memory);
  const Input in{b.codes, b.scale, b.sums};
  const auto quantize = [&](const float* from, int64_t width) {
    each(parallel, rows, std::max<int64_t>(1, (1 << 14) / width), [&](int64_t begin, int64_t end) {
      p.isa->quantize(from, begin, end, width, padded(width), p.levels, b.codes, b.scale, b.sums);
    });
  };
  const auto linear = [&](const Weight& w, float* to, Activation activation) {
    const Output target{to, w.rows, activation};
    each(parallel, w.tiles(), 1, [&](int64_t begin, int64_t end) {
      p.isa->gemm(w, in, target, 0, rows, begin, end);
    });
  };
  const auto norm = [&](const float* v, const float* residual, int which, float* sum, float* to) {
    each(parallel, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        p.block->norm(v + m * h, residual == nullptr ? nullptr : residual + m * h,
                      p.norm[2 * which], p.norm[2 * which + 1], p.epsilon[which], h,
                      sum == nullptr ? nullptr : sum + m * h, to == nullptr ? nullptr : to + m * h);
    });
  };

  if (p.pre_norm) {
    norm(x, nullptr, 0, nullptr, b.stream);
    quantize(b.stream, h);
  } else {
    quantize(x, h);
  }
  const int64_t tiles = p.linear[kQuery].tiles();
  each(parallel, 3 * tiles, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t which = begin / tiles, t = begin % tiles;
      const int64_t last = std::min(tiles, t + end - begin);
      p.isa->gemm(p.linear[which], in, {b.qkv + which * rows * a, a, Activation::none}, 0, rows, t,
                  last);
      begin += last - t;
    }
  });
  each(parallel, sequences * p.heads, 1, [&](int64_t begin, int64_t end) {
    void* scratch = head_scratch().get(p.block->head_bytes(p.tokens, p.width));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / p.heads, offset = s * p.tokens * a + (i % p.heads) * p.width;
      const float* mask = p.mask == nullptr ? nullptr : p.mask + (first + s) * p.mask_batch;
      p.block->attend({b.qkv + offset, b.qkv + rows * a + offset, b.qkv + 2 * rows * a + offset, a,
                       b.context + offset, p.tokens, p.width, mask, p.mask_row, p.scaling},
                      p.attention, scratch);
    }
  });
  quantize(b.context, a);
  float* attended = b.qkv;  // its contents have been used
  linear(p.linear[kOutput], attended, Activation::none);
  float* stream = b.stream;
  float* ffn_input = stream;
  if (p.pre_norm) {
    ffn_input = b.context;
    norm(attended, x, 1, stream, ffn_input);
  } else {
    norm(attended, x, 0, nullptr, stream);
  }
  quantize(ffn_input, h);
  linear(p.linear[kUp], b.inner, p.activation);
  quantize(b.inner, p.inner);
  linear(p.linear[kDown], attended, Activation::none);
  if (p.pre_norm) norm(attended, stream, 1, out, nullptr);
  else norm(attended, stream, 1, nullptr, out);
}

// A chunk of about this many tokens stays in the cache of a core.
constexpr int64_t kTokens = 192;

Tensor encoder_block(Tensor x, std::optional<Tensor> mask, std::vector<Tensor> tensors,
                     std::vector<int64_t> shapes, std::vector<int64_t> settings,
                     std::vector<double> numbers) {
  require(x.dim() == 3 && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
          "the input must be contiguous float32 of (batch, tokens, hidden)");
  require(tensors.size() == 3 * kLinears + 4 && shapes.size() == 5 * kLinears &&
              settings.size() == 10 && numbers.size() == 3,
          "the arguments are not complete");
  Plan p{};
  p.hidden = x.size(2);
  p.tokens = x.size(1);
  p.heads = settings[0];
  p.width = settings[1];
  p.pre_norm = settings[2] != 0;
  p.activation = static_cast<Activation>(settings[3]);
  p.levels = static_cast<float>(settings[4]);
  for (int i = 4; i < 8; ++i)
    require(settings[i] >= 1 && settings[i] <= 127, "a signed operand has 1 to 127 levels");
  require(settings[8] >= 1 && settings[8] <= 255, "the attention map has 1 to 255 levels");
  p.attention = {static_cast<float>(settings[5]), static_cast<float>(settings[6]),
                 static_cast<float>(settings[7]), static_cast<float>(settings[8])};
  p.isa = chosen(settings[9]);
  p.block = block_of(p.isa);
  require(p.block != nullptr, "these instructions have no encoder block");
  require(p.width >= 1 && p.width <= 512 && p.heads >= 1, "a head has 1 to 512 features");
  p.inner = shapes[5 * kUp];
  const int64_t a = p.attended();
  const int64_t outputs[] = {a, a, a, p.hidden, p.inner, p.hidden};
  const int64_t inputs[] = {p.hidden, p.hidden, p.hidden, a, p.hidden, p.inner};
  for (int i = 0; i < kLinears; ++i) {
    const int64_t* s = &shapes[5 * i];  // rows, width, bits, step, lo
    const Tensor &panels = tensors[3 * i], &scale = tensors[3 * i + 1], &bias = tensors[3 * i + 2];
    require(s[0] == outputs[i] && s[1] == inputs[i] && (s[2] == 1 || s[2] == 2) && s[1] <= 32768,
            "a weight does not fit the block");
    require(panels.scalar_type() == ScalarType::Byte && panels.is_contiguous() &&
                panels.numel() == panel_bytes(s[0], s[1], s[2]),
            "the panels do not fit the weight");
    const bool per_row = scale.numel() == s[0];
    p.linear[i] = {static_cast<const uint8_t*>(panels.const_data_ptr()),
                   s[0],
                   padded(s[1]),
                   static_cast<int>(s[2]),
                   static_cast<int>(s[3]),
                   static_cast<int>(s[4]),
                   floats(scale, per_row ? s[0] : 1, "the scale does not fit the weight"),
                   per_row && s[0] > 1,
                   bias.numel() == 0 ? nullptr
                                     : floats(bias, s[0], "the bias does not fit the weight")};
  }
  for (int i = 0; i < 4; ++i)
    p.norm[i] = floats(tensors[3 * kLinears + i], p.hidden, "a norm does not fit the block");
  p.scaling = static_cast<float>(numbers[0]);
  p.epsilon[0] = static_cast<float>(numbers[1]);
  p.epsilon[1] = static_cast<float>(numbers[2]);
  const int64_t batch = x.size(0);
  if (mask) {
    require(mask->dim() == 4 && mask->scalar_type() == ScalarType::Float && mask->size(1) == 1 &&
                mask->size(3) == p.tokens && (p.tokens == 1 || mask->stride(3) == 1) &&
                (mask->size(2) == p.tokens || mask->size(2) == 1) &&
                (mask->size(0) == batch || mask->size(0) == 1),
            "the mask must be float32 of (batch, 1, queries or 1, keys)");
    p.mask = static_cast<const float*>(mask->const_data_ptr());
    p.mask_batch = mask->size(0) == 1 ? 0 : mask->stride(0);
    p.mask_row = mask->size(2) == 1 ? 0 : mask->stride(2);
  }
  Tensor out = torch::stable::new_empty(x, {batch, p.tokens, p.hidden});
  if (out.numel() == 0) return out;
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t each_chunk = std::max<int64_t>(1, kTokens / p.tokens);
  const int64_t chunks = (batch + each_chunk - 1) / each_chunk;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const bool share_chunks = threads > 1 && chunks >= threads;
  const auto body = [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    void* memory = scratch.get(Buffers::size(p, each_chunk * p.tokens));
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * each_chunk, count = std::min(each_chunk, batch - first);
      const int64_t offset = first * p.tokens * p.hidden;
      run(p, from + offset, to + offset, first, count, memory, threads > 1 && !share_chunks);
    }
    scratch.trim();
  };
  each(share_chunks, chunks, 1, body);
  return out;
}

}  // namespace
}  // namespace tutelage

STABLE_TORCH_LIBRARY_FRAGMENT(tutelage, m) {
  m.def(
      "encoder_block(Tensor x, Tensor? mask, Tensor[] tensors, int[] shapes, int[] settings, "
      "float[] numbers) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tutelage, CPU, m) {
  m.impl("encoder_block", TORCH_BOX(&tutelage::encoder_block));
}
