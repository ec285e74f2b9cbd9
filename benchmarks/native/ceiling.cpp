// Most that one core multiplies and adds of 8-bit integers: two operations an element.
#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

#define DOT(r) "vpdpbusd %1, %0, %%zmm" #r "\n"

// Giga-operations a second of 24 independent vpdpbusd.
extern "C" double vnni_ceiling() {
  const __m512i a = _mm512_set1_epi8(2), b = _mm512_set1_epi8(3);
  constexpr long kRounds = 4000000;
  const double start = now();
  for (long i = 0; i < kRounds; ++i)
    __asm__ volatile(
        DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10) DOT(11) DOT(12) DOT(13) DOT(14) DOT(15)
        DOT(16) DOT(17) DOT(18) DOT(19) DOT(20) DOT(21) DOT(22) DOT(23) DOT(24) DOT(25) DOT(26)
        DOT(27) : : "v"(a), "v"(b)
        : "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
          "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",
          "xmm23", "xmm24", "xmm25", "xmm26", "xmm27");
  return kRounds * 24.0 * 128.0 / (now() - start) / 1e9;
}

#if defined(__AMX_INT8__)
struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// The same of four independent products of hardware tiles, operands in registers.
extern "C" double amx_ceiling() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 0.0;
  Config c;
  for (int t = 0; t < 8; ++t) c.bytes[t] = 64, c.rows[t] = 16;
  _tile_loadconfig(&c);
  alignas(64) static int8_t data[1024];
  std::memset(data, 1, sizeof data);
  _tile_loadd(4, data, 64);
  _tile_loadd(5, data, 64);
  constexpr long kRounds = 500000;
  const double start = now();
  for (long i = 0; i < kRounds; ++i) {
    _tile_dpbssd(0, 4, 5);
    _tile_dpbssd(1, 4, 5);
    _tile_dpbssd(2, 4, 5);
    _tile_dpbssd(3, 4, 5);
  }
  const double seconds = now() - start;
  _tile_release();
  return kRounds * 4.0 * 2.0 * 16 * 16 * 64 / seconds / 1e9;
}
#endif
