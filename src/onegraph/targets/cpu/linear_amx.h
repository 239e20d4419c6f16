// `onegraph::linear` by matrix instructions (AMX), for bf16 and any number of tokens.
//
// The weight is multiplied where it lies: sixteen of its rows are sixteen rows of a register, read at the distance that
// they have in memory, so it needs no copy in another order. The tokens are the second factor, whose pairs of elements
// have to stand together: they are few, and are packed in each call. Results stand outputs first, and are transposed in
// registers. While a block of rows is multiplied the next one is fetched into the cache. Products are exact and sums
// fp32; each token has a column of its own, so that nothing of a token reaches another.
//
// Letters: T tokens, O outputs (the weight's rows), I inputs.
#if defined(ONEGRAPH_AMX)

namespace onegraph {

constexpr int64_t BLOCK_ROWS = 2 * EDGE;  // rows of the weight that are multiplied together

// Thirty-two elements, of which `count` are there; zeros after them.
static inline __m512i read_few(const BFloat16* from, int64_t count) {
  if (count >= DEEP) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << std::max<int64_t>(count, 0)) - 1), from);
}

// Sixteen tokens' pairs of elements, packed[step][pair][token]: zeros for what isn't there.
static void pack_tokens(const Linear& p, int64_t tile, int64_t step, BFloat16* packed) {
  const BFloat16* from = static_cast<const BFloat16*>(p.x) + tile * EDGE * p.x_stride + step * DEEP;
  __m512i rows[EDGE];
  for (int64_t i = 0; i < EDGE; i++)
    rows[i] = tile * EDGE + i < p.T ? read_few(from + i * p.x_stride, p.I - step * DEEP) : _mm512_setzero_si512();
  transpose(rows);
  for (int64_t i = 0; i < EDGE; i++) _mm512_store_si512(packed + i * DEEP, rows[i]);
}

// Up to thirty-two rows of the weight. `last` has the elements of the last step, where there are fewer than its 32.
struct RowBlock {
  const BFloat16 *rows, *last;
  int64_t stride, first, count;
};

// Rows of the weight as they lie; a copy of those at the end, if they are no whole block, with zeros where there are none.
static RowBlock row_block(const Linear& p, int64_t first, int64_t steps, BFloat16* copies) {
  RowBlock block{static_cast<const BFloat16*>(p.weight) + first * p.weight_stride, nullptr, p.weight_stride, first, 0};
  block.count = std::min(BLOCK_ROWS, p.O - first);
  const bool is_whole = block.count == BLOCK_ROWS;
  const int64_t from = is_whole ? p.I / DEEP : 0, width = (steps - from) * DEEP;
  if (width == 0) return block;
  for (int64_t row = 0; row < BLOCK_ROWS; row++)
    for (int64_t step = from; step < steps; step++) {
      const int64_t count = row < block.count ? p.I - step * DEEP : 0;
      const __m512i some = read_few(block.rows + row * p.weight_stride + step * DEEP, count);
      _mm512_storeu_si512(copies + row * width + (step - from) * DEEP, some);
    }
  if (is_whole) {
    block.last = copies;
  } else {
    block.rows = copies;
    block.stride = width;
  }
  return block;
}

// Rows to fetch into the cache while others are multiplied.
struct Fetched {
  const BFloat16* rows;
  int64_t stride, count;
};

// sums[tile of tokens][half of the block][output][token] of one tile of tokens, or of two.
template <bool TWO>
static inline void multiply_block(
    const RowBlock& block, const BFloat16* tokens, int64_t steps, const Fetched& fetched, float* sums) {
  const BFloat16 *upper = block.rows, *lower = upper + EDGE * block.stride, *others = tokens + steps * MATRIX;
  int64_t stride = block.stride * 2;
  _tile_zero(0);
  _tile_zero(1);
  if (TWO) {
    _tile_zero(2);
    _tile_zero(3);
  }
  memory_is_written();
  for (int64_t step = 0; step < steps; step++, upper += DEEP, lower += DEEP) {
    if (block.last != nullptr && step == steps - 1) {
      upper = block.last;
      lower = upper + MATRIX;
      stride = DEEP * 2;
    }
    _tile_loadd(6, tokens + step * MATRIX, 64);
    _tile_loadd(4, upper, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, lower, stride);
    _tile_dpbf16ps(1, 5, 6);
    if (TWO) {
      _tile_loadd(7, others + step * MATRIX, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (int64_t row = 0; row < fetched.count; row++)
      __builtin_prefetch(fetched.rows + row * fetched.stride + step * DEEP, 0, 2);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + EDGE * EDGE, 64);
  if (TWO) {
    _tile_stored(2, sums + 2 * EDGE * EDGE, 64);
    _tile_stored(3, sums + 3 * EDGE * EDGE, 64);
  }
  memory_is_written();
}

// Adds the bias and writes one tile of tokens, up to 32 outputs of each.
static inline void write_block(const Linear& p, const RowBlock& block, int64_t tile, const float* sums) {
  const __mmask32 some = static_cast<__mmask32>((1ull << block.count) - 1);
  Floats bias[2] = {};
  if (p.bias != nullptr) {
    BFloat16 few[BLOCK_ROWS] = {};
    std::memcpy(static_cast<void*>(few), static_cast<const BFloat16*>(p.bias) + block.first, block.count * 2);
    for (int half = 0; half < 2; half++) bias[half] = load(few + half * W);
  }
  __m512i halves[2][EDGE];
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < EDGE; i++) halves[half][i] = _mm512_load_si512(sums + (half * EDGE + i) * EDGE);
    transpose(halves[half]);
  }
  BFloat16* to = static_cast<BFloat16*>(p.out) + tile * EDGE * p.O + block.first;
  for (int64_t i = 0; i < std::min(EDGE, p.T - tile * EDGE); i++, to += p.O) {
    const auto of = [&](int half) { return reinterpret_cast<Floats>(halves[half][i]) + bias[half]; };
    _mm512_mask_storeu_epi16(to, some, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(of(1), of(0))));
  }
}

static void linear_by_matrices(const Linear& p) {
  const int64_t steps = (p.I + DEEP - 1) / DEEP, tiles = (p.T + EDGE - 1) / EDGE, pairs = (tiles + 1) / 2;
  const int64_t blocks = (p.O + BLOCK_ROWS - 1) / BLOCK_ROWS, threads = p.used_threads();
  const int64_t fetched_rows = (BLOCK_ROWS + pairs - 1) / pairs;  // with each pair of tiles
  const int64_t copied = BLOCK_ROWS * steps * DEEP;
  BFloat16* packed = reinterpret_cast<BFloat16*>(scratch((tiles * steps * MATRIX + threads * copied) / 2));
  for (int64_t item = 0; item < tiles * steps; item++)  // takes less time than threads need to wait for each other
    pack_tokens(p, item / steps, item % steps, packed + item * MATRIX);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Registers registers;
    BFloat16* copies = packed + tiles * steps * MATRIX + omp_get_thread_num() * copied;
    alignas(64) float sums[4 * EDGE * EDGE];
#pragma omp for schedule(static)
    for (int64_t number = 0; number < blocks; number++) {
      const RowBlock block = row_block(p, number * BLOCK_ROWS, steps, copies);
      const BFloat16* next = static_cast<const BFloat16*>(p.weight) + (number + 1) * BLOCK_ROWS * p.weight_stride;
      const int64_t left = std::min(BLOCK_ROWS, p.O - (number + 1) * BLOCK_ROWS);
      for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t from = pair * fetched_rows, tile = pair * 2;
        const Fetched fetched{
            next + from * p.weight_stride, p.weight_stride, std::clamp<int64_t>(left - from, 0, fetched_rows)};
        if (tile + 1 < tiles) {
          multiply_block<true>(block, packed + tile * steps * MATRIX, steps, fetched, sums);
          write_block(p, block, tile + 1, sums + 2 * EDGE * EDGE);
        } else {
          multiply_block<false>(block, packed + tile * steps * MATRIX, steps, fetched, sums);
        }
        write_block(p, block, tile, sums);
      }
    }
  }
}

}  // namespace onegraph
#endif
