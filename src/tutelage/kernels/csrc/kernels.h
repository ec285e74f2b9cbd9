// Products of 1- and 2-bit weights with 8-bit activations, exact in int32.
//
// Weights lie in panels of 64 bytes x (depth / 4). Byte 4 i + c of vector r holds codes of depth
// 4 r + c: with 2 bits those of outputs i, i + 16, i + 32, i + 48 of a panel of 64 (output group j
// at bits 2 j), with 1 bit those of eight such groups, a panel of 128. A code is an index; the
// weight is lo + step * index. Depth is padded with index 0 to a multiple of 64, where activations
// are zero.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tutelage {

constexpr int kGroup = 16;   // outputs in a vector
constexpr int kTile = 64;    // outputs that are computed together, and padding of the depth

enum class Activation : int { none = 0, gelu = 1, relu = 2, gelu_tanh = 3 };

struct Weight {
  const uint8_t* panels;
  int64_t rows;      // outputs
  int64_t depth;     // padded to kTile
  int bits;          // 1 or 2
  int step;
  int lo;
  const float* scale;
  bool scale_per_row;
  const float* bias;  // or nullptr

  int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  const uint8_t* tile(int64_t t) const { return panels + (bits == 2 ? t : t / 2) * depth * 16; }
  // The lowest bit of group j of tile t.
  int shift(int64_t t, int j) const { return bits == 2 ? 2 * j : static_cast<int>(4 * (t & 1)) + j; }
  int mask() const { return bits == 2 ? 3 : 1; }
};

struct Input {
  const int8_t* codes;   // rows x depth, zero beyond the width
  const float* scale;    // one a row
  const int32_t* sums;   // of the codes of a row
};

struct Output {
  float* values;
  int64_t stride;
  Activation activation;
};

// Rows of up to four dimensions that need not lie one after the other; the last is contiguous.
struct Strides {
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};
  int64_t offset(int64_t row) const {
    const int64_t last = row % size[2], rest = row / size[2];
    return last * stride[2] + rest % size[1] * stride[1] + rest / size[1] * stride[0];
  }
};

// Uniform quantization of every row of x times factor: scale = largest / top, codes
// round(x / scale). Codes go to bytes, or to floats where bytes is nullptr.
struct UniformRows {
  const float* x;
  Strides rows;
  const float* factor;  // or nullptr
  Strides factor_rows;
  int64_t width;
  float top;
  bool has_sign;  // largest is that of the magnitudes; else codes below zero become zero
  int8_t* bytes;
  float* floats;
  float* scale;
};

enum class WeightKind : int { ternary = 0, binary = 1, four_level = 2 };

// A threshold from the mean magnitude of a row, the codes, and their least-squares scale. Sums are
// of float64, which hold them exactly unless magnitudes differ by more than 2^19.
struct WeightRows {
  const float* x;
  int64_t width;
  WeightKind kind;
  float threshold;  // in mean magnitudes
  int8_t* bytes;
  float* floats;
  float* scale;
};

// ((sums * row scale) * column scale) + bias in place: int32 becomes float32.
struct SumRows {
  int32_t* sums;
  int64_t width;
  const float* row_scale;
  bool per_row;
  const float* column_scale;
  bool per_column;
  const float* bias;  // or nullptr
};

// Differences (own - other) * mask: their squares are summed by row, or, where out is given, they
// are written there times gain.
struct ErrorRows {
  const float* own;
  const float* other;
  const float* mask;  // or nullptr
  Strides mask_rows;
  bool mask_per_value;
  int64_t width;
  double* sums;
  const float* gain;
  float* out;
};

// What a training step does to rows [begin, end).
struct Rows {
  void (*uniform)(const UniformRows&, int64_t begin, int64_t end);
  void (*weight)(const WeightRows&, int64_t begin, int64_t end);
  void (*scale_codes)(const int8_t* codes, const float* scale, bool per_row, int64_t width,
                      float* out, int64_t begin, int64_t end);
  void (*scale_sums)(const SumRows&, int64_t begin, int64_t end);
  void (*squared)(const ErrorRows&, int64_t begin, int64_t end);
};

struct Isa {
  const char* name;
  // Symmetric quantization of rows [begin, end): scale = max|x| / top, codes round(x / scale),
  // rounding half to even.
  void (*quantize)(const float* x, int64_t begin, int64_t end, int64_t width, int64_t depth,
                   float top, int8_t* codes, float* scale, int32_t* sums);
  // values = activation(((codes . weight) * input scale) * weight scale + bias) for rows
  // [row, row_end) and outputs of tiles [tile, tile_end).
  void (*gemm)(const Weight&, const Input&, const Output&, int64_t row, int64_t row_end,
               int64_t tile, int64_t tile_end);
  const Rows* rows;
};

// Codes that the operands of attention reach: signed of Q, K, V, unsigned of the map.
struct Levels {
  float query, key, value, map;
};

// One head of one sequence: width features of each token, a row of the mask for each query or for
// all of them (stride 0).
struct Head {
  const float* query;
  const float* key;
  const float* value;
  int64_t stride;  // between tokens, of the three and of the context
  float* context;
  int64_t tokens;
  int64_t width;
  const float* mask;  // added to the scores, or nullptr
  int64_t mask_stride;
  float scaling;
};

// What a Transformer block needs beside Linears.
struct Block {
  size_t (*head_bytes)(int64_t tokens, int64_t width);
  // Q, K and V quantized per token, softmax in float32, the map times V's scales per query.
  void (*attend)(const Head&, const Levels&, void* scratch);
  // out = norm(x + residual) of one row; either residual or out of the sum may be nullptr.
  void (*norm)(const float* x, const float* residual, const float* weight, const float* bias,
               float epsilon, int64_t width, float* sum, float* out);
};

const Block* block512();  // nullptr where it was not compiled
const Rows* rows512();    // likewise

const Isa* scalar_isa();
const Isa* avx2_isa();    // nullptr where it was not compiled
const Isa* vnni_isa();
const Isa* amx_isa();

}  // namespace tutelage
