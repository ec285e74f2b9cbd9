// The plain path: what the others are checked against, and what serves any processor.
#include "rows.h"
#include "scalar.h"

namespace tutelage {
namespace {

void gemm(const Weight& w, const Input& in, const Output& out, int64_t row, int64_t row_end,
          int64_t tile, int64_t tile_end) {
  for (int64_t m = row; m < row_end; ++m) {
    const int8_t* x = in.codes + m * w.depth;
    for (int64_t t = tile; t < tile_end; ++t) {
      const uint8_t* panel = w.tile(t);
      int32_t sums[kTile] = {};
      for (int j = 0; j < 4; ++j) {
        const int shift = w.shift(t, j), mask = w.mask();
        for (int64_t k = 0; k < w.depth; k += 4) {
          const uint8_t* lanes = panel + 16 * k;
          for (int i = 0; i < kGroup; ++i)
            for (int c = 0; c < 4; ++c)
              sums[kGroup * j + i] += ((lanes[4 * i + c] >> shift) & mask) * x[k + c];
        }
      }
      finish_scalar(w, in, out, m, t, sums);
    }
  }
}

}  // namespace

const Isa* scalar_isa() {
  static const Isa isa{"scalar", quantize_scalar, gemm, rows_of_this_file()};
  return &isa;
}

}  // namespace tutelage
