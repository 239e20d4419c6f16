// `onegraph::linear` by blocks, for bf16 and many tokens on a CPU that has no instructions for bf16.
//
// There the products are those of fp32, so both factors are widened, in blocks that fit the caches (the scheme of Goto
// and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008). Rows of the weight are widened as they
// lie, each once for up to MAX_BLOCK_TOKENS tokens; tokens are put into columns, so that a vector has one input of W
// tokens, and is multiplied by one element of each of several rows, whose sums stay in registers. Sums are fp32, of
// MAX_SUMMED products or fewer, and then of these; how a result is summed depends on the number of inputs alone.
//
// Letters: T tokens, O outputs (the weight's rows), I inputs, W floats of a vector.
#if !defined(__AVX512BF16__) && !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define ONEGRAPH_BLOCKED 1

namespace onegraph {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t SUMS = 24;  // vectors that stay in registers
#else
constexpr int64_t SUMS = 12;
#endif
constexpr int64_t HEIGHT = 2 * SUMS;  // rows of a block
constexpr int64_t MAX_DEPTH = 576;    // inputs of a block: HEIGHT widened rows and a tile of tokens stay in the cache
constexpr int64_t MAX_SUMMED = 192;   // products in one sum: longer ones lose more to rounding
constexpr int64_t MAX_BLOCK_TOKENS = 512;
constexpr int64_t COLUMNS = 2 * W;    // tokens of a tile; the last one may be half as wide
constexpr int64_t ROW_STRIDE = MAX_DEPTH + 16;  // of a widened row: no multiple of what the cache's ways are apart
constexpr int64_t SERIAL_PACKING = 1 << 15;  // elements that take less time than threads need to wait for each other
static_assert(HEIGHT % SUMS == 0 && HEIGHT % W == 0 && MAX_BLOCK_TOKENS % COLUMNS == 0);

// Exchanges the halves of each 2 x 2 matrix of two rows, APART from each other.
template <int APART>
static inline void exchange(Floats& a, Floats& b) {
  Floats first, second;
  for (int i = 0; i < W; i++) {
    first[i] = i & APART ? b[i & ~APART] : a[i];
    second[i] = i & APART ? b[i] : a[i | APART];
  }
  a = first;
  b = second;
}

// W rows, in place.
template <int APART = 1>
static inline void transpose(Floats (&rows)[W]) {
  if constexpr (APART < W) {
    for (int i = 0; i < W; i++)
      if (!(i & APART)) exchange<APART>(rows[i], rows[i + APART]);
    transpose<2 * APART>(rows);
  }
}

static inline int64_t columns_of(int64_t tokens) { return tokens <= W ? W : COLUMNS; }

// Up to COLUMNS tokens, packed[input][token]: zeros for those that aren't there.
template <typename T>
static void pack_columns(const Linear& p, int64_t token, float* packed) {
  const int64_t columns = columns_of(p.T - token);
  for (int64_t first = 0; first < columns; first += W, token += W) {
    const T* from = static_cast<const T*>(p.x) + token * p.x_stride;
    const int64_t count = std::clamp<int64_t>(p.T - token, 0, W);
    float* to = packed + first;
    int64_t i = 0;
    for (; i + W <= p.I; i += W) {
      Floats rows[W] = {};
      for (int64_t t = 0; t < count; t++) rows[t] = load(from + t * p.x_stride + i);
      transpose(rows);
      for (int64_t k = 0; k < W; k++) store(to + (i + k) * columns, rows[k]);
    }
    for (; i < p.I; i++)
      for (int64_t t = 0; t < W; t++) to[i * columns + t] = t < count ? to_float(from[t * p.x_stride + i]) : 0.0f;
  }
}

// Adds to the sums of SUMS / VECTORS rows, sums[row][token], the products of some inputs; the first ones set them.
template <int VECTORS>
static inline void multiply_tile(const float* rows, const float* tokens, int64_t depth, float* sums, bool is_first) {
  constexpr int ROWS = SUMS / VECTORS;
  for (int64_t first = 0; first < depth; first += MAX_SUMMED) {
    const int64_t end = std::min(depth, first + MAX_SUMMED);
    Floats sum[ROWS][VECTORS] = {};
#pragma GCC unroll 2
    for (int64_t i = first; i < end; i++) {
      Floats some[VECTORS];
      for (int v = 0; v < VECTORS; v++) some[v] = load(tokens + (i * VECTORS + v) * W);
      for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] += rows[r * ROW_STRIDE + i] * some[v];
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) {
        float* to = sums + (r * VECTORS + v) * W;
        store(to, is_first && first == 0 ? sum[r][v] : load(to) + sum[r][v]);
      }
  }
}

// Adds the bias and writes `count` outputs, from `row` on, of one tile of tokens.
template <typename T>
static void write_tile(const Linear& p, int64_t row, int64_t count, int64_t token, const float* sums) {
  const int64_t columns = columns_of(p.T - token), end = std::min(p.T, token + columns);
  const T* bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + row;
  for (int64_t r = 0; r < count; r += W) {
    const bool is_whole = r + W <= count;
    const Floats added = bias != nullptr && is_whole ? load(bias + r) : Floats{};
    for (int64_t first = token; first < end; first += W) {
      const int64_t tokens = std::min<int64_t>(W, end - first);
      const float* from = sums + r * columns + first - token;
      T* to = static_cast<T*>(p.out) + first * p.O + row + r;
      if (is_whole) {
        Floats rows[W];
        for (int64_t k = 0; k < W; k++) rows[k] = load(from + k * columns);
        transpose(rows);
        for (int64_t t = 0; t < W; t++) rows[t] += added;
        for (int64_t t = 0; t < tokens; t++) store(to + t * p.O, rows[t]);
      } else {
        for (int64_t k = 0; k < count - r; k++)
          for (int64_t t = 0; t < tokens; t++)
            store_one(to + t * p.O + k, from[k * columns + t] + (bias ? to_float(bias[r + k]) : 0.0f));
      }
    }
  }
}

// Rows `row` to `end` of the weight for tokens `token` to `last`, which are packed. `own` is memory of the thread.
template <typename T>
static void multiply_rows_by_blocks(
    const Linear& p, int64_t row, int64_t end, int64_t token, int64_t last, const float* packed, float* own) {
  const int64_t depths = (p.I + MAX_DEPTH - 1) / MAX_DEPTH, depth = ((p.I + depths - 1) / depths + W - 1) / W * W;
  float *widened = own, *sums = own + HEIGHT * ROW_STRIDE;
  for (; row < end; row += HEIGHT) {
    const int64_t count = std::min(HEIGHT, end - row), padded = (count + SUMS - 1) / SUMS * SUMS;
    for (int64_t i = 0; i < p.I; i += depth) {
      const int64_t size = std::min(depth, p.I - i);
      const T* from = static_cast<const T*>(p.weight) + row * p.weight_stride + i;
      for (int64_t r = 0; r < padded; r++, from += p.weight_stride) {
        if (row + HEIGHT + r < end)
          for (int64_t k = 0; k < size; k += 64 / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(from + HEIGHT * p.weight_stride + k, 0, 2);
        widen(from, widened + r * ROW_STRIDE, r < count ? size : 0, size);
      }
      for (int64_t t = token; t < last; t += COLUMNS) {
        const float* tile = packed + (t - token) * p.I;
        float* to = sums + (t - token) * HEIGHT;
        if (columns_of(p.T - t) == W) {
          for (int64_t r = 0; r < padded; r += SUMS)
            multiply_tile<1>(widened + r * ROW_STRIDE, tile + i * W, size, to + r * W, i == 0);
        } else {
          for (int64_t r = 0; r < padded; r += SUMS / 2)
            multiply_tile<2>(widened + r * ROW_STRIDE, tile + i * COLUMNS, size, to + r * COLUMNS, i == 0);
        }
      }
    }
    for (int64_t t = token; t < last; t += COLUMNS) write_tile<T>(p, row, count, t, sums + (t - token) * HEIGHT);
  }
}

template <typename T>
static void linear_by_blocks(const Linear& p) {
  const int64_t most = (std::min(p.T, MAX_BLOCK_TOKENS) + COLUMNS - 1) / COLUMNS * COLUMNS;
  const int64_t units = (p.O + SUMS - 1) / SUMS, threads = std::min(p.used_threads(), units);
  const int64_t owned = HEIGHT * (ROW_STRIDE + most);
  const bool packs_first = p.T <= MAX_BLOCK_TOKENS && p.T * p.I <= SERIAL_PACKING;
  float* own = scratch(threads * owned + most * p.I);
  float* packed = own + threads * owned;
  if (packs_first)
    for (int64_t t = 0; t < p.T; t += COLUMNS) pack_columns<T>(p, t, packed + t * p.I);
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t token = 0; token < p.T; token += MAX_BLOCK_TOKENS) {
    const int64_t last = std::min(p.T, token + MAX_BLOCK_TOKENS);
    if (token > 0) {
#pragma omp barrier
    }
    if (!packs_first) {
#pragma omp for schedule(static)
      for (int64_t t = token; t < last; t += COLUMNS) pack_columns<T>(p, t, packed + (t - token) * p.I);
    }
#pragma omp for schedule(static) nowait
    for (int64_t part = 0; part < threads; part++) {
      const int64_t row = part * units / threads * SUMS, end = std::min(p.O, (part + 1) * units / threads * SUMS);
      multiply_rows_by_blocks<T>(p, row, end, token, last, packed, own + omp_get_thread_num() * owned);
    }
  }
}

}  // namespace onegraph
#endif
