// `onegraph::linear` by vectors: rows of the weight, in the order of memory, against few tokens.
//
// Several rows are multiplied at a time, so that their sums stay in registers and memory is read as several streams;
// rows further on are fetched meanwhile. Each weight is read once for all tokens. Sums are fp32, and how a result is
// summed doesn't depend on the other rows or on the number of threads.
//
// Letters: T tokens, O outputs (the weight's rows), I inputs, W floats of a vector.

namespace onegraph {

constexpr int64_t FETCHED_AHEAD = 16;     // rows of the weight between those that are multiplied and those fetched
constexpr int64_t SERIAL_LINEAR = 1 << 16;  // multiplications that take less time than starting threads
#if defined(__AVX512F__)
constexpr int MAX_TOKENS = 4;  // whose sums of four rows stay in registers
#else
constexpr int MAX_TOKENS = 2;
#endif

struct Linear {
  void* out;                           // [T, O], contiguous
  const void *x, *weight, *bias;       // [T, I], [O, I], [O] or null; elements of a row are next to one another
  int64_t T, O, I;
  int64_t x_stride, weight_stride;     // between rows, in elements
  int64_t threads;

  int64_t used_threads() const { return T * O * I < SERIAL_LINEAR ? 1 : threads; }
};

// What is multiplied in one step: SIZE elements of T, whose products are added to a vector of sums.
template <typename T>
struct Step {
  static constexpr int64_t SIZE = W;
  using Value = Floats;
  static Value read(const T* from) { return load(from); }
  static Value read_few(const T* from, int64_t count) {  // zeros after the last
    T few[SIZE] = {};
    std::memcpy(static_cast<void*>(few), from, count * sizeof(T));
    return load(few);
  }
  static Floats add(Floats sum, Value a, Value b) { return sum + a * b; }
};
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <>
struct Step<BFloat16> {
  static constexpr int64_t SIZE = 2 * W;
  using Value = __m512bh;
  static Value read(const BFloat16* from) { return reinterpret_cast<Value>(_mm512_loadu_si512(from)); }
  static Value read_few(const BFloat16* from, int64_t count) {
    return reinterpret_cast<Value>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), from));
  }
  static Floats add(Floats sum, Value a, Value b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

// ROWS outputs of TOKENS tokens.
template <typename T, int ROWS, int TOKENS>
static inline void multiply_rows(const Linear& p, int64_t row, int64_t token, bool fetches) {
  using By = Step<T>;
  const T* weight = static_cast<const T*>(p.weight) + row * p.weight_stride;
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  const T* ahead = weight + FETCHED_AHEAD * p.weight_stride;
  Floats sum[TOKENS][ROWS] = {};
  int64_t i = 0;
  for (; i + By::SIZE <= p.I; i += By::SIZE) {
    typename By::Value some[TOKENS];
    for (int t = 0; t < TOKENS; t++) some[t] = By::read(x + t * p.x_stride + i);
    for (int r = 0; r < ROWS; r++) {
      const auto value = By::read(weight + r * p.weight_stride + i);
      if (fetches) __builtin_prefetch(ahead + r * p.weight_stride + i, 0, 2);
      for (int t = 0; t < TOKENS; t++) sum[t][r] = By::add(sum[t][r], value, some[t]);
    }
  }
  if (i < p.I)
    for (int r = 0; r < ROWS; r++) {
      const auto value = By::read_few(weight + r * p.weight_stride + i, p.I - i);
      for (int t = 0; t < TOKENS; t++)
        sum[t][r] = By::add(sum[t][r], value, By::read_few(x + t * p.x_stride + i, p.I - i));
    }
  const T* bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + row;
  for (int t = 0; t < TOKENS; t++) {
    T* to = static_cast<T*>(p.out) + (token + t) * p.O + row;
    for (int r = 0; r < ROWS; r += 4) {
      const auto of = [&](int k) { return r + k < ROWS ? sum[t][r + k] : Floats{}; };
      const Four four = sums(of(0), of(1), of(2), of(3));
      for (int k = 0; k < 4 && r + k < ROWS; k++) store_one(to + r + k, four[k] + (bias ? to_float(bias[r + k]) : 0.0f));
    }
  }
}

// ROWS outputs of the last tokens, which are at most TOKENS.
template <typename T, int ROWS, int TOKENS>
static inline void multiply_last_tokens(const Linear& p, int64_t row, int64_t token, bool fetches) {
  if constexpr (TOKENS > 0) {
    if (p.T - token == TOKENS) return multiply_rows<T, ROWS, TOKENS>(p, row, token, fetches);
    multiply_last_tokens<T, ROWS, TOKENS - 1>(p, row, token, fetches);
  }
}

template <typename T>
static void linear_by_vectors(const Linear& p) {
  constexpr int ROWS = 4, BLOCK = 8;
  const int64_t blocks = (p.O + BLOCK - 1) / BLOCK, threads = p.used_threads();
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < blocks; block++) {
    int64_t row = block * BLOCK;
    const int64_t end = std::min(p.O, row + BLOCK);
    const bool fetches = end + FETCHED_AHEAD <= p.O;
    if (p.T == 1 && end - row == BLOCK) {
      multiply_rows<T, BLOCK, 1>(p, row, 0, fetches);
      continue;
    }
    for (; row + ROWS <= end; row += ROWS) {
      int64_t token = 0;
      for (; token + MAX_TOKENS <= p.T; token += MAX_TOKENS)
        multiply_rows<T, ROWS, MAX_TOKENS>(p, row, token, fetches && token == 0);
      multiply_last_tokens<T, ROWS, MAX_TOKENS - 1>(p, row, token, fetches && token == 0);
    }
    for (; row < end; row++)
      for (int64_t token = 0; token < p.T; token++) multiply_rows<T, 1, 1>(p, row, token, false);
  }
}

}  // namespace onegraph
