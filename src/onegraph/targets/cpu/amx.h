// Matrix instructions (AMX) for bf16, where the compiler may use them: their registers, and what feeds them.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define ONEGRAPH_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

namespace onegraph {

constexpr int64_t EDGE = 16;                 // rows of a matrix register, each of 64 bytes
constexpr int64_t DEEP = 32;                 // bf16 of such a row
constexpr int64_t MATRIX = EDGE * DEEP;      // bf16 of a register

// Whether the system lets this process use the registers.
static bool amx_is_allowed() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return allowed;
}

// All registers at their full size, for as long as this lives.
struct Registers {
  Registers() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64);
    _tile_loadconfig(&config);
  }
  ~Registers() { _tile_release(); }
};

// The instructions' memory isn't seen by every compiler.
static inline void memory_is_written() { __asm__ volatile("" ::: "memory"); }

// Sixteen rows of sixteen words, in place.
static inline void transpose(__m512i (&rows)[EDGE]) {
  __m512i other[EDGE];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + 2 + j]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + 2 + j]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; j++) {
      other[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0x88);
      other[i + 4 + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    rows[j] = _mm512_shuffle_i32x4(other[j], other[8 + j], 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(other[j], other[8 + j], 0xdd);
  }
}

}  // namespace onegraph
#endif
