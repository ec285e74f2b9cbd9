// AMX: codes are unpacked to signed bytes in cache, tile by tile, and multiplied there.
#include <cstdlib>
#include <cstring>

#include "vector512.h"

namespace tutelage {
namespace {

constexpr int kChunk = 64;                // depth of a hardware tile
constexpr int kTileBytes = 1024;          // 16 rows of 64 bytes
constexpr int kPanelChunk = 4 * kTileBytes;

const Isa* few_rows() { return vnni_isa(); }
constexpr int64_t kFewRows = 3;

// Accumulators are tiles 0 to 3. Layout "wide": one block of rows, four of outputs; A is tile 4, B 5
// to 7. Layout "square": two of each; A is 4 and 5, B is 6 and 7.
struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure_wide(int rows) {
  Config c;
  for (int t = 0; t < 8; ++t) c.bytes[t] = 64, c.rows[t] = t <= 4 ? rows : 16;
  _tile_loadconfig(&c);
}

void configure_square(int lower) {
  Config c;
  for (int t = 0; t < 8; ++t) c.bytes[t] = 64, c.rows[t] = 16;
  c.rows[2] = c.rows[3] = c.rows[5] = lower;
  _tile_loadconfig(&c);
}

struct Unpacker {
  __m512i values, low;
  int shift[4];
  Unpacker(const Weight& w, int64_t tile) : low(_mm512_set1_epi8(w.mask())) {
    alignas(64) int8_t table[64];
    for (int i = 0; i < 64; ++i) table[i] = static_cast<int8_t>(w.lo + w.step * (i & w.mask()));
    values = _mm512_load_si512(table);
    for (int j = 0; j < 4; ++j) shift[j] = w.shift(tile, j);
  }
  // 64 of depth: four tiles, one for each group of outputs.
  void chunk(const uint8_t* panel, int8_t* to) const {
    const __m128i s0 = _mm_cvtsi32_si128(shift[0]), s1 = _mm_cvtsi32_si128(shift[1]),
                  s2 = _mm_cvtsi32_si128(shift[2]), s3 = _mm_cvtsi32_si128(shift[3]);
    for (int r = 0; r < 16; ++r) {
      const __m512i v = _mm512_loadu_si512(panel + 64 * r);
      const auto put = [&](int j, __m128i s) {
        const __m512i index = _mm512_and_si512(_mm512_srl_epi16(v, s), low);
        _mm512_store_si512(to + j * kTileBytes + 64 * r, _mm512_shuffle_epi8(values, index));
      };
      put(0, s0);
      put(1, s1);
      put(2, s2);
      put(3, s3);
    }
  }
};

// Sums of a 16-row block of outputs j, as stored from a tile.
void finish_tile(const Weight& w, const Input& in, const Output& out, int64_t m, int rows,
                 int64_t n, const int32_t* sums) {
  for (int r = 0; r < rows; ++r)
    finish512(w, out, in.scale[m + r], m + r, n, _mm512_load_si512(sums + 16 * r));
}

// At most 16 rows: unpacking and multiplying alternate, so that neither waits for the other.
void narrow(const Weight& w, const Input& in, const Output& out, int64_t m, int rows,
            int64_t tile, int8_t* buffer) {
  const Unpacker unpack(w, tile);
  const uint8_t* panel = w.tile(tile);
  const int8_t* x = in.codes + m * w.depth;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t chunks = w.depth / kChunk;
  unpack.chunk(panel, buffer);
  for (int64_t c = 0; c < chunks; ++c) {
    int8_t* b = buffer + (c & 1) * kPanelChunk;
    if (c + 1 < chunks)
      unpack.chunk(panel + (c + 1) * kChunk * 16, buffer + ((c + 1) & 1) * kPanelChunk);
    _tile_loadd(4, x + c * kChunk, w.depth);
    _tile_loadd(5, b, 64);
    _tile_dpbssd(0, 4, 5);
    _tile_loadd(6, b + kTileBytes, 64);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(7, b + 2 * kTileBytes, 64);
    _tile_dpbssd(2, 4, 7);
    _tile_loadd(5, b + 3 * kTileBytes, 64);
    _tile_dpbssd(3, 4, 5);
  }
  alignas(64) int32_t sums[4][256];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  for (int j = 0; j < 4; ++j)
    finish_tile(w, in, out, m, rows, tile * kTile + j * kGroup, sums[j]);
}

// 17 to 32 rows by 32 outputs (groups 2 h and 2 h + 1) of an unpacked panel.
void square(const Weight& w, const Input& in, const Output& out, int64_t m, int lower,
            int64_t tile, int h, const int8_t* unpacked) {
  const int8_t* x = in.codes + m * w.depth;
  const int8_t* b = unpacked + 2 * h * kTileBytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < w.depth; k += kChunk, b += kPanelChunk) {
    _tile_loadd(4, x + k, w.depth);
    _tile_loadd(6, b, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + kTileBytes, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, x + 16 * w.depth + k, w.depth);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  alignas(64) int32_t sums[4][256];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  const int64_t n = tile * kTile + 2 * h * kGroup;
  finish_tile(w, in, out, m, 16, n, sums[0]);
  finish_tile(w, in, out, m, 16, n + kGroup, sums[1]);
  finish_tile(w, in, out, m + 16, lower, n, sums[2]);
  finish_tile(w, in, out, m + 16, lower, n + kGroup, sums[3]);
}

struct Buffer {
  int8_t* bytes = nullptr;
  size_t size = 0;
  int8_t* get(size_t wanted) {
    if (wanted > size) {
      std::free(bytes);
      bytes = static_cast<int8_t*>(std::aligned_alloc(64, wanted));
      size = bytes == nullptr ? 0 : wanted;
    }
    return bytes;
  }
  ~Buffer() { std::free(bytes); }
};

void gemm(const Weight& w, const Input& in, const Output& out, int64_t row, int64_t row_end,
          int64_t tile, int64_t tile_end) {
  const int64_t rows = row_end - row;
  if (rows <= kFewRows) return few_rows()->gemm(w, in, out, row, row_end, tile, tile_end);
  static thread_local Buffer buffer;
  if (rows <= 16) {
    int8_t* b = buffer.get(2 * kPanelChunk);
    configure_wide(static_cast<int>(rows));
    for (int64_t t = tile; t < tile_end; ++t)
      narrow(w, in, out, row, static_cast<int>(rows), t, b);
    _tile_release();
    return;
  }
  int8_t* b = buffer.get(static_cast<size_t>(w.depth) * kTile);
  const int64_t full = rows / 32 * 32, rest = rows - full;
  for (int64_t t = tile; t < tile_end; ++t) {
    const Unpacker unpack(w, t);
    const uint8_t* panel = w.tile(t);
    for (int64_t k = 0; k < w.depth; k += kChunk) unpack.chunk(panel + 16 * k, b + k * kTile);
    for (int h = 0; h < 2; ++h) {
      if (full > 0) configure_square(16);
      for (int64_t m = 0; m < full; m += 32) square(w, in, out, row + m, 16, t, h, b);
      if (rest > 16) {
        configure_square(static_cast<int>(rest - 16));
        square(w, in, out, row + full, static_cast<int>(rest - 16), t, h, b);
      }
    }
    if (rest > 0 && rest <= 16) {
      configure_wide(static_cast<int>(rest));
      alignas(64) int8_t chunks[2 * kPanelChunk];
      narrow(w, in, out, row + full, static_cast<int>(rest), t, chunks);
    }
  }
  _tile_release();
}

}  // namespace

const Isa* amx_isa() {
  static const Isa isa{"amx_int8", quantize512, gemm, rows512()};
  return &isa;
}

}  // namespace tutelage
