// Rotary position embedding of queries and keys, alone and with the write of keys and values into the paged KV cache.
//
// What `onegraph::rotary` and `onegraph::rotary_write_kv_cache` say in Python (ops/), for fp32 and bf16. A product is
// rounded to the dtype before it is added, as PyTorch does op by op, so results are bit by bit those of the reference.
//
// Letters: T tokens, H query heads, K key-value heads, D head size, R the part of it that turns.

namespace onegraph {

constexpr int64_t SERIAL_ELEMENTS = 1 << 16;  // that take less time than starting threads
constexpr int64_t MAX_TURNED = 512;

// What products are once they were stored. Such a product of bf16 needs no care for NaN: what is cut off it is zero. The
// empty instruction keeps a product and a sum of fp32 from becoming one operation.
static inline Floats rounded(Floats value, const BFloat16*) {
#if defined(__AVX512BF16__)
  const __m256i halves = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(_mm512_cvtepu16_epi32(halves)) << 16);
#else
  const Words bits = reinterpret_cast<Words>(value);
  return reinterpret_cast<Floats>((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000);
#endif
}
static inline Floats rounded(Floats value, const float*) {
#if defined(__SSE3__)
  asm("" : "+v"(value));
#else
  asm("" : "+w"(value));
#endif
  return value;
}

static inline void store_rounded(float* to, Floats value) { store(to, value); }
static inline void store_rounded(BFloat16* to, Floats value) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
#else
  store(to, value);
#endif
}

// One head of one token: `from` and `to` are [D], `cos` and `sin` [R].
template <typename T>
static inline void turn(T* to, const T* from, const float* cos, const float* sin, int64_t R, int64_t D) {
  const int64_t half = R / 2;
  int64_t d = 0;
  for (; d + W <= half; d += W) {
    const Floats first = load(from + d), second = load(from + half + d);
    store_rounded(to + d, rounded(first * load(cos + d), to) - rounded(second * load(sin + d), to));
    store_rounded(to + half + d, rounded(second * load(cos + half + d), to) + rounded(first * load(sin + half + d), to));
  }
  const auto product = [&](T factor, float other) {
    T stored;
    store_one(&stored, to_float(factor) * other);
    asm("" : "+m"(stored));
    return to_float(stored);
  };
  for (; d < half; d++) {
    store_one(to + d, product(from[d], cos[d]) - product(from[half + d], sin[d]));
    store_one(to + half + d, product(from[half + d], cos[half + d]) + product(from[d], sin[half + d]));
  }
  if (R < D) std::memcpy(to + R, from + R, (D - R) * sizeof(T));
}

struct Rotary {
  void *q_out, *k_out, *v_out;  // [T, H, D]; [T, K, D], or the caches where there are slots
  const void *q, *k, *v, *cos, *sin;
  const int64_t* slots;  // [T], or null
  int64_t T, H, K, D, R, num_slots;
  int64_t q_stride, k_stride, v_stride;  // of a token; heads lie side by side
  int64_t cos_stride, sin_stride;
  int64_t threads;
};

template <typename U>
static void rotary(const Rotary& p) {
  if (p.slots)
    for (int64_t t = 0; t < p.T; t++)
      if (p.slots[t] >= p.num_slots) throw std::out_of_range("slot_mapping names a slot that isn't in the cache");
#pragma omp parallel for num_threads(p.threads) if (p.threads > 1 && p.T * (p.H + p.K) * p.D > SERIAL_ELEMENTS)
  for (int64_t t = 0; t < p.T; t++) {
    float cos[MAX_TURNED], sin[MAX_TURNED];
    widen(static_cast<const U*>(p.cos) + t * p.cos_stride, cos, p.R, p.R);
    widen(static_cast<const U*>(p.sin) + t * p.sin_stride, sin, p.R, p.R);
    const U* q = static_cast<const U*>(p.q) + t * p.q_stride;
    U* q_out = static_cast<U*>(p.q_out) + t * p.H * p.D;
    for (int64_t head = 0; head < p.H; head++) turn(q_out + head * p.D, q + head * p.D, cos, sin, p.R, p.D);
    const int64_t row = p.slots ? p.slots[t] : t;
    if (row < 0) continue;
    const U* k = static_cast<const U*>(p.k) + t * p.k_stride;
    U* k_out = static_cast<U*>(p.k_out) + row * p.K * p.D;
    for (int64_t head = 0; head < p.K; head++) turn(k_out + head * p.D, k + head * p.D, cos, sin, p.R, p.D);
    if (p.slots)
      std::memcpy(
          static_cast<U*>(p.v_out) + row * p.K * p.D, static_cast<const U*>(p.v) + t * p.v_stride,
          p.K * p.D * sizeof(U));
  }
}

static void run_rotary(
    void* q_out, void* k_out, Optional<void> v_out, const void* q, const void* k, Optional<const void> v, const void* cos,
    const void* sin, Optional<const int64_t> slots, int64_t T, int64_t H, int64_t K, int64_t D, int64_t R,
    int64_t num_slots, int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t cos_stride, int64_t sin_stride,
    int64_t threads, bool is_bfloat16) {
  const Rotary p{
      q_out, k_out, v_out.pointer, q, k, v.pointer, cos, sin, slots.pointer, T, H, K, D, R, num_slots, q_stride, k_stride,
      v_stride, cos_stride, sin_stride, threads};
  is_bfloat16 ? rotary<BFloat16>(p) : rotary<float>(p);
}

}  // namespace onegraph
