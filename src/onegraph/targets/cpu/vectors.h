// Vectors of fp32 and bf16 for the widest instructions that the compiler may use, and a thread's own memory.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>
#include <omp.h>

#if defined(__SSE3__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace onegraph {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats of a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(W * 4)));
typedef float LooseFloats __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint32_t Words __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef float Four __attribute__((vector_size(16)));

struct BFloat16 {
  uint16_t bits;
};

static inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
static inline void store(float* to, Floats value) { *reinterpret_cast<LooseFloats*>(to) = value; }
static inline Floats load(const BFloat16* from) {
#if defined(__AVX512F__)  // the compiler's own conversion takes two to four times as many instructions
  const Words words = reinterpret_cast<Words>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  const Words words = reinterpret_cast<Words>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  const Words words = __builtin_convertvector(*reinterpret_cast<const LooseHalves*>(from), Words);
#endif
  return reinterpret_cast<Floats>(words << 16);
}
static inline float to_float(float value) { return value; }
static inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
static inline void store_one(float* to, float value) { *to = value; }
static inline void store_one(BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void store(BFloat16* to, Floats value) {  // to the nearest, ties to even
  const Words bits = reinterpret_cast<Words>(value);
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words not_a_number = reinterpret_cast<Words>(value != value);
  rounded = (rounded & ~not_a_number) | (not_a_number & 0x7fc0);
  *reinterpret_cast<LooseHalves*>(to) = __builtin_convertvector(rounded, Halves);
}

template <typename T>
static inline void widen(const T* from, float* to, int64_t size, int64_t padded) {
  int64_t d = 0;
  for (; d + W <= size; d += W) store(to + d, load(from + d));
  for (; d < size; d++) to[d] = to_float(from[d]);
  for (; d < padded; d++) to[d] = 0;
}

template <typename T>
static inline void scale_into(T* to, const float* from, float factor, int64_t size) {
  int64_t d = 0;
  for (; d + W <= size; d += W) store(to + d, load(from + d) * factor);
  for (; d < size; d++) store_one(to + d, from[d] * factor);
}

template <typename F>
static inline Four fold(Floats value, F&& combine) {
  Four parts[W / 4];
  std::memcpy(parts, &value, sizeof(parts));
  if constexpr (W == 16) {
    return combine(combine(parts[0], parts[1]), combine(parts[2], parts[3]));
  } else if constexpr (W == 8) {
    return combine(parts[0], parts[1]);
  } else {
    return parts[0];
  }
}

// The sums over each of four vectors.
static inline Four sums(Floats a, Floats b, Floats c, Floats d) {
  Four folded[4];
  const Floats given[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++) folded[i] = fold(given[i], [](Four x, Four y) { return x + y; });
#if defined(__SSE3__)
  return _mm_hadd_ps(_mm_hadd_ps(folded[0], folded[1]), _mm_hadd_ps(folded[2], folded[3]));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vpaddq_f32(vpaddq_f32(folded[0], folded[1]), vpaddq_f32(folded[2], folded[3]));
#else
  Four result;
  for (int i = 0; i < 4; i++) result[i] = (folded[i][0] + folded[i][1]) + (folded[i][2] + folded[i][3]);
  return result;
#endif
}

// Memory of a thread that is kept between calls.
static float* scratch(int64_t floats) {
  struct Freed {
    void operator()(float* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<float, Freed> memory;
  static thread_local int64_t held = 0;
  if (floats > held) {
    memory.reset();
    held = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
    if (!memory) throw std::bad_alloc();
    held = floats;
  }
  return memory.get();
}

}  // namespace onegraph
