// What the ways to attend share: the problem, its cut into items, rows and their state.
namespace onegraph {

#if defined(__AVX512F__)
constexpr int MAX_MULTIPLIED = 12;   // rows whose sums stay in registers, two vectors each
constexpr int MAX_SHARED = 4;        // heads whose sums stay in registers, four vectors each
#elif defined(__AVX2__)
constexpr int MAX_MULTIPLIED = 6;
constexpr int MAX_SHARED = 2;
#else
constexpr int MAX_MULTIPLIED = 6;
constexpr int MAX_SHARED = 2;
#endif
constexpr int PANEL = 2 * W;         // keys that are multiplied at a time
constexpr int TILE_KEYS = 64;        // keys that the rows of an item share while they are in the cache
constexpr int TILE_ROWS = 192;       // rows of an item
constexpr int DOT_KEYS = 128;        // keys of a query of its own that are weighed at a time
constexpr int CHUNK = 8;             // of which so many are read for all heads, one after the other
constexpr int AHEAD = 2 * CHUNK;     // and so far before they are
constexpr int MAX_DOT_ROWS = 16;     // from here on, multiplying tiles is faster
constexpr int64_t SPLIT_KEYS = 128;  // keys of an item where a request has one tile of queries
constexpr int64_t SERIAL_WORK = 1 << 18;  // multiplications that take less time than starting threads
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504088896340736f;

// 2^x for x <= 0, within 2 units in the last place; NaN stays NaN, and what underflows is 0.
static inline Floats exp2_below_one(Floats x) {
  const Ints underflows = x < -126.0f;
  x = underflows ? Floats{} - 126.0f : x;
  const Floats shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, which stands in the last bits
  const Floats fraction = x - (shifted - 12582912.0f);
  Floats power = fraction * 0.000153458108f + 0.001339993121f;  // fitted to 2e-9 on [-1/2, 1/2]
  power = power * fraction + 0.009618488962f;
  power = power * fraction + 0.05550328777f;
  power = power * fraction + 0.240226468906f;
  power = power * fraction + 0.693147205737f;
  power = power * fraction + 1.0f;
  const Words exponent = (reinterpret_cast<Words>(shifted) << 23) + 0x3f800000u;
  power *= reinterpret_cast<Floats>(exponent);
  return underflows ? Floats{} : power;
}

// tanh by a rational function (the coefficients are Eigen's, within 3 units in the last place); NaN stays NaN.
static inline Floats tanh(Floats x) {
  constexpr float END = 7.90531110763549805f;  // from here on it is 1
  x = x > END ? Floats{} + END : x;
  x = x < -END ? Floats{} - END : x;
  const Floats square = x * x;
  Floats upper = square * -2.76076847742355e-16f + 2.00018790482477e-13f;
  upper = upper * square - 8.60467152213735e-11f;
  upper = upper * square + 5.12229709037114e-08f;
  upper = upper * square + 1.48572235717979e-05f;
  upper = upper * square + 6.37261928875436e-04f;
  upper = upper * square + 4.89352455891786e-03f;
  Floats lower = square * 1.19825839466702e-06f + 1.18534705686654e-04f;
  lower = lower * square + 2.26843463243900e-03f;
  lower = lower * square + 4.89352518554385e-03f;
  return x * upper / lower;
}

struct Problem {
  void* out;
  const void *q, *k_cache, *v_cache;
  const int32_t *tables, *starts, *lengths;
  const void* sinks;  // of q's type, or null
  int64_t T, H, D, N, B, K, R, M;
  int64_t token_stride, head_stride;  // of q, in elements; those of its last dim are next to one another
  int64_t table_stride;
  float scale;
  int64_t window;
  float softcap;  // 0 where there is none
  int64_t threads;

  int64_t G() const { return H / K; }
  int64_t P() const { return (D + W - 1) / W * W; }
};

struct Item {
  int64_t request;
  int64_t first_head, num_heads;    // of q; those of one key-value head, or all
  int64_t first_token, num_queries;
  int64_t first_position;           // of the first query in its context
  int64_t begin, end;               // the keys' places in the context
  int64_t part;                     // where its result stands in the parts, in floats; -1: it is the output
  bool by_dots, has_sinks;

  int64_t rows() const { return num_queries * num_heads; }
};

// Rows whose items' results are to be merged; the parts follow one another.
struct Merge {
  Item first;
  int64_t num_parts;
};

// What a row has seen so far: `most` is the highest score, `total` the sum of 2^(score - most).
struct State {
  float *sums, *most, *total;  // [rows, P], [rows], [rows]
  State(float* memory, int64_t rows, int64_t P) : sums(memory), most(memory + rows * P), total(most + rows) {}
  static int64_t size(int64_t rows, int64_t P) { return rows * (P + 2); }
};

// Where the keys or values of the first head lie, for `count` places of a request's context.
template <typename T>
static inline void find_rows(
    const Problem& p, const T* cache, int64_t request, int64_t place, int64_t count, const T** rows) {
  const int32_t* table = p.tables + request * p.table_stride;
  int64_t column = place / p.B, offset = place % p.B;
  for (int64_t i = 0; i < count; column++, offset = 0) {
    const T* row = cache + (table[column] * p.B + offset) * p.K * p.D;
    for (const int64_t end = std::min(count, i + p.B - offset); i < end; i++, row += p.K * p.D) rows[i] = row;
  }
}

// What stands `from` elements after each row as fp32 rows of P floats: in place, where it is that already.
template <typename T>
static inline void widen_rows(
    const Problem& p, const T* const* rows, int64_t from, int64_t count, float* memory, const float** wide) {
  const int64_t P = p.P();
  for (int64_t i = 0; i < count; i++) {
    if constexpr (std::is_same_v<T, float>) {
      if (P == p.D) {
        wide[i] = rows[i] + from;
        continue;
      }
    }
    widen(rows[i] + from, memory + i * P, p.D, P);
    wide[i] = memory + i * P;
  }
}

// Turns a row's scores into weights and updates its state; gives the factor for the sums so far.
// `cols` is a whole number of vectors; hidden scores are NOTHING.
static inline float weigh(float* scores, int64_t cols, float& most, float& total) {
  Floats highest = Floats{} + NOTHING;
  for (int64_t i = 0; i < cols; i += W) {
    const Floats some = load(scores + i);
    highest = some > highest ? some : highest;
  }
  const Four folded = fold(highest, [](Four a, Four b) { return a > b ? a : b; });
  float now = most;
  for (int lane = 0; lane < 4; lane++) now = folded[lane] > now ? folded[lane] : now;
  const float base = now == NOTHING ? 0 : now;
  const float factor = most == now ? 1 : std::exp2(most - base);
  Floats sum{};
  for (int64_t i = 0; i < cols; i += W) {
    const Floats weights = exp2_below_one(load(scores + i) - base);
    store(scores + i, weights);
    sum += weights;
  }
  const Four added = fold(sum, [](Four a, Four b) { return a + b; });
  total = total * factor + ((added[0] + added[2]) + (added[1] + added[3]));
  most = now;
  return factor;
}

static inline void cap(const Problem& p, float* scores, int64_t cols) {
  if (p.softcap == 0) return;
  const float inside = 1 / (p.softcap * LOG2_E), outside = p.softcap * LOG2_E;
  for (int64_t i = 0; i < cols; i += W) store(scores + i, tanh(load(scores + i) * inside) * outside);
}

// The state before the first key.
template <typename T>
static void begin_rows(const Problem& p, const Item& item, State state) {
  for (int64_t row = 0; row < item.rows(); row++) {
    const int64_t head = item.first_head + row % item.num_heads;
    state.most[row] = item.has_sinks ? to_float(static_cast<const T*>(p.sinks)[head]) * LOG2_E : NOTHING;
    state.total[row] = item.has_sinks ? 1 : 0;
  }
  std::memset(state.sums, 0, item.rows() * p.P() * sizeof(float));
}

template <typename T>
static void write_rows(const Problem& p, const Item& item, State state) {
  for (int64_t row = 0; row < item.rows(); row++) {
    const int64_t token = item.first_token + row / item.num_heads, head = item.first_head + row % item.num_heads;
    T* to = static_cast<T*>(p.out) + (token * p.H + head) * p.D;
    scale_into(to, state.sums + row * p.P(), state.total[row] == 0 ? 0 : 1 / state.total[row], p.D);
  }
}

// Calls `with` with a compile-time number of heads, for at most MAX_SHARED of `heads` at a time.
template <typename F>
static inline void for_shared_heads(int64_t heads, F&& with) {
  int64_t g = 0;
  for (; g + MAX_SHARED <= heads; g += MAX_SHARED) with(g, std::integral_constant<int, MAX_SHARED>());
  if constexpr (MAX_SHARED > 3)
    if (heads - g == 3) return with(g, std::integral_constant<int, 3>());
  if (heads - g == 2) return with(g, std::integral_constant<int, 2>());
  if (heads - g == 1) return with(g, std::integral_constant<int, 1>());
}

}  // namespace onegraph
