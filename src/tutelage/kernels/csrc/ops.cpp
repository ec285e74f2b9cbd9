// The operators: arguments checked, instructions chosen, work shared out over torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "runtime.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tutelage {
namespace {

using torch::stable::Tensor;

#if defined(TUTELAGE_AMX)
bool amx_allowed() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

// Best first; only those that this processor runs.
const std::vector<const Isa*>& available() {
  static const std::vector<const Isa*> found = [] {
    std::vector<const Isa*> isas;
#if defined(TUTELAGE_VNNI)
    const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
#if defined(TUTELAGE_AMX)
    if (vnni && amx_allowed()) isas.push_back(amx_isa());
#endif
    if (vnni) isas.push_back(vnni_isa());
#endif
#if defined(TUTELAGE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      isas.push_back(avx2_isa());
#endif
    isas.push_back(scalar_isa());
    return isas;
  }();
  return found;
}

}  // namespace

const Isa* chosen(int64_t isa) {
  require(isa >= 0 && isa < static_cast<int64_t>(available().size()), "no such instruction set");
  return available()[isa];
}

const Block* block_of([[maybe_unused]] const Isa* isa) {
#if defined(TUTELAGE_VNNI)
  if (isa == vnni_isa()) return block512();
#endif
#if defined(TUTELAGE_AMX)
  if (isa == amx_isa()) return block512();
#endif
  return nullptr;
}

namespace {

// Below this many multiplications a second thread costs more than it brings.
constexpr int64_t kWorthAThread = 1 << 21;

void run(const Isa* isa, const Weight& w, const float* x, int64_t rows, int64_t width, float top,
         const Output& out, Scratch& scratch) {
  const size_t codes_bytes = (static_cast<size_t>(rows) * w.depth + 63) / 64 * 64;
  auto* codes = static_cast<int8_t*>(scratch.get(codes_bytes + rows * 8));
  auto* scale = reinterpret_cast<float*>(codes + codes_bytes);
  auto* sums = reinterpret_cast<int32_t*>(scale + rows);
  const Input in{codes, scale, sums};
  const int64_t tiles = w.tiles(), work = rows * tiles * kTile * w.depth;
  const int64_t threads =
      work < 2 * kWorthAThread ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
  if (threads == 1) {
    isa->quantize(x, 0, rows, width, w.depth, top, codes, scale, sums);
    isa->gemm(w, in, out, 0, rows, 0, tiles);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / w.depth);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    isa->quantize(x, begin, end, width, w.depth, top, codes, scale, sums);
  });
  // Tiles first: a tile's weights are unpacked once for all rows of a block.
  const int64_t block = tiles >= 4 * threads ? rows : 256;
  const int64_t blocks = (rows + block - 1) / block;
  torch::stable::parallel_for(0, tiles * blocks, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / tiles, t = begin % tiles;
      const int64_t last = std::min(tiles, t + end - begin);
      isa->gemm(w, in, out, b * block, std::min(rows, (b + 1) * block), t, last);
      begin += last - t;
    }
  });
}

Tensor packed_linear(Tensor x, Tensor panels, Tensor scale, std::optional<Tensor> bias,
                     int64_t rows, int64_t width, int64_t bits, int64_t step, int64_t lo,
                     int64_t levels, int64_t activation, int64_t isa) {
  using torch::headeronly::ScalarType;
  require(x.dim() >= 1 && x.size(x.dim() - 1) == width,
          "the input has not as many features as the weight");
  require(x.scalar_type() == ScalarType::Float && x.is_contiguous(),
          "the input must be contiguous float32");
  require(bits == 1 || bits == 2, "weights have 1 or 2 bits");
  require(levels >= 1 && levels <= 127, "an input has 1 to 127 levels on each side of zero");
  require(width <= 32768, "the weight is wider than sums of 32 bits hold");
  require(panels.scalar_type() == ScalarType::Byte && panels.is_contiguous() &&
              panels.numel() == panel_bytes(rows, width, bits),
          "the panels do not fit the weight");
  require(scale.scalar_type() == ScalarType::Float && scale.is_contiguous() &&
              (scale.numel() == rows || scale.numel() == 1),
          "the scale does not fit the weight");
  require(!bias || (bias->scalar_type() == ScalarType::Float && bias->is_contiguous() &&
                    bias->numel() == rows),
          "the bias does not fit the weight");
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  shape.push_back(rows);
  Tensor out = torch::stable::new_empty(x, shape);
  const int64_t count = width == 0 ? out.numel() / std::max<int64_t>(rows, 1) : x.numel() / width;
  if (count == 0 || rows == 0) return out;
  const Weight w{static_cast<const uint8_t*>(panels.const_data_ptr()),
                 rows,
                 padded(width),
                 static_cast<int>(bits),
                 static_cast<int>(step),
                 static_cast<int>(lo),
                 static_cast<const float*>(scale.const_data_ptr()),
                 scale.numel() == rows && rows > 1,
                 bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr};
  static thread_local Scratch scratch;
  run(chosen(isa), w, static_cast<const float*>(x.const_data_ptr()), count, width,
      static_cast<float>(levels),
      {static_cast<float*>(out.mutable_data_ptr()), rows, static_cast<Activation>(activation)},
      scratch);
  scratch.trim();
  return out;
}

}  // namespace
}  // namespace tutelage

extern "C" __attribute__((visibility("default"))) const char* tutelage_isa(int64_t index) {
  const auto& found = tutelage::available();
  return index >= 0 && index < static_cast<int64_t>(found.size()) ? found[index]->name : nullptr;
}

extern "C" __attribute__((visibility("default"))) int tutelage_has_block(int64_t index) {
  const auto& found = tutelage::available();
  return index >= 0 && index < static_cast<int64_t>(found.size()) &&
         tutelage::block_of(found[index]) != nullptr;
}

STABLE_TORCH_LIBRARY_FRAGMENT(tutelage, m) {
  m.def(
      "packed_linear(Tensor x, Tensor panels, Tensor scale, Tensor? bias, int rows, int width, "
      "int bits, int step, int lo, int levels, int activation, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tutelage, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&tutelage::packed_linear));
}
