// What operators share: arguments, scratch memory, the choice of instructions.
#pragma once

#include <cstdlib>
#include <new>
#include <stdexcept>

#include "kernels.h"

namespace tutelage {

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

class Scratch {
 public:
  void* get(size_t wanted) {
    if (wanted > size_) {
      std::free(bytes_);
      size_ = (wanted + 4095) / 4096 * 4096;
      bytes_ = std::aligned_alloc(64, size_);
      if (bytes_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return bytes_;
  }
  // Gives back what one large call took; what usual calls take is kept.
  void trim() {
    if (size_ <= kKept) return;
    std::free(bytes_);
    bytes_ = nullptr;
    size_ = 0;
  }
  ~Scratch() { std::free(bytes_); }

 private:
  static constexpr size_t kKept = size_t{32} << 20;
  void* bytes_ = nullptr;
  size_t size_ = 0;
};

inline int64_t padded(int64_t width) { return (width + kTile - 1) / kTile * kTile; }

inline int64_t panel_bytes(int64_t rows, int64_t width, int64_t bits) {
  const int64_t outputs = bits == 2 ? kTile : 2 * kTile;
  return (rows + outputs - 1) / outputs * padded(width) * 16;
}

const Isa* chosen(int64_t isa);
// nullptr where the chosen instructions have none.
const Block* block_of(const Isa*);

}  // namespace tutelage
