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

const Isa* scalar_isa();
const Isa* avx2_isa();    // nullptr where it was not compiled
const Isa* vnni_isa();
const Isa* amx_isa();

}  // namespace tutelage
