// Attention of a flat batch of requests over a paged KV cache.
//
// What `onegraph::paged_attention` says in Python (ops/), for fp32 and bf16; arithmetic and softmax are fp32. Scores
// carry a factor of log2(e), so that the softmax is one of powers of two, taken while the keys pass by (online softmax:
// Milakov and Gimelshein, arXiv 1805.02867).
//
// The work is cut into items: some queries of a request, with some heads, over a range of keys. A query of its own
// reads the keys of all heads where they lie (`attend_by_dots`), in the order of memory, which it waits for. More
// queries, with the heads that share a key-value head, share tiles of keys and values, which are multiplied from
// registers (`attend_by_tiles`). Where the processor multiplies matrices of bf16, both are done that way instead
// (attention_amx.h). Long contexts of few rows are cut into ranges of keys whose results are merged (flash-decoding).
// How a request is cut depends on its own lengths alone, so that its result doesn't depend on its batch-mates or on
// the number of threads.
//
// Letters: T tokens, R requests, H query heads, K key-value heads, G = H / K, D head size, P is D rounded up to whole
// vectors, N blocks, B block size, M most blocks of a request. A row is a query under one head.

namespace onegraph {

// The queries of an item as fp32 rows, with the scale and log2(e).
template <typename T>
static void widen_queries(const Problem& p, const Item& item, float* queries) {
  const int64_t P = p.P();
  const Floats factor = Floats{} + p.scale * LOG2_E;
  for (int64_t row = 0; row < item.rows(); row++) {
    const int64_t token = item.first_token + row / item.num_heads, head = item.first_head + row % item.num_heads;
    float* query = queries + row * P;
    widen(static_cast<const T*>(p.q) + token * p.token_stride + head * p.head_stride, query, p.D, P);
    for (int64_t d = 0; d < P; d += W) store(query + d, load(query + d) * factor);
  }
}

// The scores of four keys under HEADS heads that share them: scores[head, i], rows of DOT_KEYS.
template <int HEADS, typename U>
static inline void four_scores(const float* queries, const U* const* keys, int64_t from, int64_t P, float* scores) {
  Floats sum[HEADS][4] = {};
  for (int64_t d = 0; d < P; d += W) {
    Floats key[4];
    for (int i = 0; i < 4; i++) key[i] = load(keys[i] + from + d);
    for (int h = 0; h < HEADS; h++) {
      const Floats query = load(queries + h * P + d);
      for (int i = 0; i < 4; i++) sum[h][i] += query * key[i];
    }
  }
  for (int h = 0; h < HEADS; h++) {
    const Four four = sums(sum[h][0], sum[h][1], sum[h][2], sum[h][3]);
    std::memcpy(scores + h * DOT_KEYS, &four, 16);
  }
}

// Adds weighted values to the sums of HEADS heads that share them, for NV vectors: to[head, P], weights[head, DOT_KEYS].
template <int HEADS, int NV, typename U>
static inline void add_values(
    float* to, const float* weights, const U* const* values, int64_t from, int64_t count, int64_t P) {
  Floats sum[HEADS][NV];
  for (int h = 0; h < HEADS; h++)
    for (int j = 0; j < NV; j++) sum[h][j] = load(to + h * P + j * W);
  for (int64_t i = 0; i < count; i++) {
    Floats value[NV];
    for (int j = 0; j < NV; j++) value[j] = load(values[i] + from + j * W);
    for (int h = 0; h < HEADS; h++)
      for (int j = 0; j < NV; j++) sum[h][j] += value[j] * weights[h * DOT_KEYS + i];
  }
  for (int h = 0; h < HEADS; h++)
    for (int j = 0; j < NV; j++) store(to + h * P + j * W, sum[h][j]);
}

// All heads' scores of up to CHUNK keys, whose rows have their key-value heads `head_step` elements apart.
template <typename U>
static inline void score_chunk(
    const Problem& p, const float* queries, const U* const* keys, int64_t head_step, int64_t count, float* scores) {
  const int64_t G = p.G(), P = p.P();
  for (int64_t i = 0; i < count; i += 4)
    for (int64_t kv_head = 0; kv_head < p.K; kv_head++)
      for_shared_heads(G, [&](int64_t g, auto heads) {
        const int64_t row = kv_head * G + g;
        four_scores<heads.value>(queries + row * P, keys + i, kv_head * head_step, P, scores + row * DOT_KEYS + i);
      });
}

// All heads' sums, with up to CHUNK values more.
template <typename U>
static inline void add_chunk(
    const Problem& p, float* sums, const U* const* values, int64_t head_step, int64_t count, const float* weights) {
  const int64_t G = p.G(), P = p.P();
  for (int64_t kv_head = 0; kv_head < p.K; kv_head++)
    for_shared_heads(G, [&](int64_t g, auto heads) {
      constexpr int HEADS = heads.value;
      const int64_t row = kv_head * G + g, from = kv_head * head_step;
      float* to = sums + row * P;
      const float* own = weights + row * DOT_KEYS;
      int64_t d = 0;
      for (; d + 4 * W <= P; d += 4 * W) add_values<HEADS, 4>(to + d, own, values, from + d, count, P);
      for (; d < P; d += W) add_values<HEADS, 1>(to + d, own, values, from + d, count, P);
    });
}

// Has rows of `size` elements brought into the cache, which the processor doesn't guess across blocks.
template <typename T>
static inline void prefetch(const T* const* rows, int64_t begin, int64_t end, int64_t size) {
  for (int64_t i = begin; i < end; i++)
    for (int64_t at = 0; at < size; at += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(rows[i] + at);
}

// Calls `with(rows, head_step, first, count)` for chunks of rows in which whole vectors can be read: in place where
// heads are whole vectors, else as fp32 copies. Up to three rows beyond a chunk's end repeat its first.
template <typename T, typename F>
static inline void for_chunks(const Problem& p, const T** rows, int64_t count, float* memory, F&& with) {
  const int64_t P = p.P();
  if (P == p.D) {
    for (int64_t i = count; i % 4; i++) rows[i] = rows[0];
    for (int64_t i = 0; i < count; i += CHUNK) {
      prefetch(rows, i + AHEAD, std::min(count, i + AHEAD + CHUNK), p.K * p.D);
      with(rows + i, p.D, i, std::min<int64_t>(CHUNK, count - i));
    }
    return;
  }
  const float* wide[CHUNK];
  for (int64_t i = 0; i < CHUNK; i++) wide[i] = memory + i * p.K * P;
  for (int64_t i = 0; i < count; i += CHUNK) {
    const int64_t some = std::min<int64_t>(CHUNK, count - i);
    for (int64_t j = 0; j < CHUNK; j++)
      for (int64_t kv_head = 0; kv_head < p.K; kv_head++)
        widen(rows[i + (j < some ? j : 0)] + kv_head * p.D, memory + (j * p.K + kv_head) * P, p.D, P);
    with(static_cast<const float* const*>(wide), P, i, some);
  }
}

template <typename T>
static void attend_by_dots(const Problem& p, const Item& item, State state, const float* queries, float* memory) {
  const int64_t P = p.P();
  const T* rows[DOT_KEYS];
  float* scores = memory + CHUNK * p.K * P;  // [H, DOT_KEYS]
  for (int64_t place = item.begin; place < item.end; place += DOT_KEYS) {
    const int64_t count = std::min<int64_t>(DOT_KEYS, item.end - place), cols = (count + W - 1) / W * W;
    find_rows(p, static_cast<const T*>(p.k_cache), item.request, place, count, rows);
    for_chunks<T>(p, rows, count, memory, [&](auto keys, int64_t head_step, int64_t first, int64_t some) {
      score_chunk(p, queries, keys, head_step, some, scores + first);
    });
    for (int64_t row = 0; row < p.H; row++) {
      float* own = scores + row * DOT_KEYS;
      std::fill(own + count, own + cols, 0.0f);
      cap(p, own, cols);
      std::fill(own + count, own + cols, NOTHING);
      const float factor = weigh(own, cols, state.most[row], state.total[row]);
      float* sum = state.sums + row * P;
      if (factor != 1)
        for (int64_t d = 0; d < P; d += W) store(sum + d, load(sum + d) * factor);
    }
    find_rows(p, static_cast<const T*>(p.v_cache), item.request, place, count, rows);
    for_chunks<T>(p, rows, count, memory, [&](auto values, int64_t head_step, int64_t first, int64_t some) {
      add_chunk(p, state.sums, values, head_step, some, scores + first);
    });
  }
}

// sum[r][j] += left[r, k] * right[k, j] over k, for ROWS rows and NV vectors.
template <int ROWS, int NV>
static inline void multiply(
    const float* left, int64_t left_stride, const float* right, int64_t right_stride, int64_t count, Floats (&sum)[ROWS][NV]) {
  for (int64_t k = 0; k < count; k++) {
    Floats some[NV];
    for (int j = 0; j < NV; j++) some[j] = load(right + k * right_stride + j * W);
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < NV; j++) sum[r][j] += some[j] * left[r * left_stride + k];
  }
}

template <int ROWS, int NV>
static inline void multiply_values(
    float* to, const float* factors, const float* weights, const float* values, int64_t count, int64_t P) {
  Floats sum[ROWS][NV];
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < NV; j++) sum[r][j] = load(to + r * P + j * W) * factors[r];
  multiply<ROWS, NV>(weights, TILE_KEYS, values, P, count, sum);
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < NV; j++) store(to + r * P + j * W, sum[r][j]);
}

// A tile of keys and values in the form that it is multiplied in: keys [panel, P, PANEL], values [count, P].
struct Tile {
  const float *keys, *values;
  int64_t place, count;
};

// ROWS rows from `row` on against one tile.
template <int ROWS>
static void attend_tile(
    const Problem& p, const Item& item, const Tile& tile, int64_t row, State state, const float* queries, float* scores) {
  const int64_t G = p.G(), P = p.P();
  const int64_t first = item.first_position + row / G, last = item.first_position + (row + ROWS - 1) / G;
  const int64_t count = std::min(tile.count, last + 1 - tile.place);
  if (count <= 0 || tile.place + count <= first - p.window + 1) return;
  const int64_t panels = (count + PANEL - 1) / PANEL, cols = panels * PANEL;
  for (int64_t panel = 0; panel < panels; panel++) {
    Floats sum[ROWS][2] = {};
    multiply<ROWS, 2>(queries + row * P, P, tile.keys + panel * P * PANEL, PANEL, p.D, sum);
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < 2; j++) store(scores + r * TILE_KEYS + panel * PANEL + j * W, sum[r][j]);
  }
  float factors[ROWS];
  for (int r = 0; r < ROWS; r++) {
    const int64_t position = item.first_position + (row + r) / G;
    const int64_t end = std::clamp<int64_t>(position + 1 - tile.place, 0, count);
    const int64_t begin = std::clamp<int64_t>(position - p.window + 1 - tile.place, 0, end);
    float* own = scores + r * TILE_KEYS;
    cap(p, own, cols);
    std::fill(own, own + begin, NOTHING);
    std::fill(own + end, own + cols, NOTHING);
    factors[r] = weigh(own, cols, state.most[row + r], state.total[row + r]);
  }
  float* to = state.sums + row * P;
  int64_t d = 0;
  for (; d + PANEL <= P; d += PANEL) multiply_values<ROWS, 2>(to + d, factors, scores, tile.values + d, count, P);
  if (d < P) multiply_values<ROWS, 1>(to + d, factors, scores, tile.values + d, count, P);
}

template <int ROWS>
static void attend_last_rows(
    const Problem& p, const Item& item, const Tile& tile, int64_t row, int64_t rows, State state, const float* queries,
    float* scores) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return attend_tile<ROWS>(p, item, tile, row, state, queries, scores);
    attend_last_rows<ROWS - 1>(p, item, tile, row, rows, state, queries, scores);
  }
}

// Rows of P floats as panels of PANEL keys: panels[panel, d, key]. Columns beyond `count` are zero.
static void pack_keys(const float* const* rows, int64_t count, int64_t P, float* panels) {
  for (int64_t panel = 0; panel < count; panel += PANEL, panels += P * PANEL)
    for (int64_t i = 0; i < PANEL; i++)
      for (int64_t d = 0; d < P; d++) panels[d * PANEL + i] = panel + i < count ? rows[panel + i][d] : 0;
}

template <typename T>
static void attend_by_tiles(const Problem& p, const Item& item, State state, const float* queries, float* memory) {
  const int64_t P = p.P(), rows = item.rows(), from = item.first_head / p.G() * p.D;
  const T* found[TILE_KEYS];
  const float* wide[TILE_KEYS];
  float *keys = memory, *values = keys + TILE_KEYS * P, *scores = values + TILE_KEYS * P;
  for (int64_t place = item.begin; place < item.end; place += TILE_KEYS) {
    const int64_t count = std::min<int64_t>(TILE_KEYS, item.end - place);
    find_rows(p, static_cast<const T*>(p.k_cache), item.request, place, count, found);
    widen_rows(p, found, from, count, values, wide);
    pack_keys(wide, count, P, keys);
    find_rows(p, static_cast<const T*>(p.v_cache), item.request, place, count, found);
    for (int64_t i = 0; i < count; i++) widen(found[i] + from, values + i * P, p.D, P);
    const Tile tile{keys, values, place, count};
    int64_t row = 0;
    for (; row + MAX_MULTIPLIED <= rows; row += MAX_MULTIPLIED)
      attend_tile<MAX_MULTIPLIED>(p, item, tile, row, state, queries, scores);
    attend_last_rows<MAX_MULTIPLIED - 1>(p, item, tile, row, rows - row, state, queries, scores);
  }
}

// By matrix instructions, where the processor has them for this type and size.
template <typename T>
static bool run_item_by_matrices(const Problem& p, const Item& item, const Item* next, float* parts) {
#if defined(ONEGRAPH_AMX)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (!uses_matrices(p)) return false;
    const int64_t size = (State::size(item.rows(), p.D) + W - 1) / W * W;
    float* own = scratch(size + matrix_memory(p, item));
    const State state(item.part < 0 ? own : parts + item.part, item.rows(), p.D);
    begin_rows<T>(p, item, state);
    const Registers registers;
    if (item.by_dots) {
      attend_one_by_matrices(p, item, next != nullptr && next->by_dots ? next : nullptr, state, own + size);
    } else {
      attend_by_matrices(p, item, state, own + size);
    }
    if (item.part < 0) write_rows<T>(p, item, state);
    return true;
  }
#endif
  return false;
}

template <typename T>
static void run_item(const Problem& p, const Item& item, const Item* next, float* parts) {
  if (run_item_by_matrices<T>(p, item, next, parts)) return;
  const int64_t P = p.P(), rows = item.rows();
  const int64_t tile = item.by_dots ? CHUNK * p.K * P + p.H * DOT_KEYS : TILE_KEYS * (2 * P + MAX_MULTIPLIED);
  float* queries = scratch(rows * P + State::size(rows, P) + tile);
  float* own = queries + rows * P;
  const State state(item.part < 0 ? own : parts + item.part, rows, P);
  float* memory = own + (State::size(rows, P) + W - 1) / W * W;
  begin_rows<T>(p, item, state);
  widen_queries<T>(p, item, queries);
  if (item.by_dots) {
    attend_by_dots<T>(p, item, state, queries, memory);
  } else {
    attend_by_tiles<T>(p, item, state, queries, memory);
  }
  if (item.part < 0) write_rows<T>(p, item, state);
}

template <typename T>
static void run_merge(const Problem& p, const Merge& merge, float* parts) {
  const int64_t P = p.P(), rows = merge.first.rows(), size = State::size(rows, P);
  const State merged(parts + merge.first.part, rows, P);
  for (int64_t i = 1; i < merge.num_parts; i++) {
    const State other(parts + merge.first.part + i * size, rows, P);
    for (int64_t row = 0; row < rows; row++) {
      const float most = std::max(merged.most[row], other.most[row]), base = most == NOTHING ? 0 : most;
      const float ours = std::exp2(merged.most[row] - base), theirs = std::exp2(other.most[row] - base);
      float *to = merged.sums + row * P, *from = other.sums + row * P;
      for (int64_t d = 0; d < P; d += W) store(to + d, load(to + d) * ours + load(from + d) * theirs);
      merged.total[row] = merged.total[row] * ours + other.total[row] * theirs;
      merged.most[row] = most;
    }
  }
  write_rows<T>(p, merge.first, merged);
}

struct Plan {
  std::vector<Item> items;
  std::vector<Merge> merges;
  int64_t part_floats = 0, work = 0;
};

static void plan_request(const Problem& p, int64_t request, bool by_dots, Plan& plan) {
  const int64_t first = p.starts[request], num_queries = p.starts[request + 1] - first, length = p.lengths[request];
  const int64_t G = p.G(), P = p.P(), heads = by_dots ? p.H : G;
  const int64_t step = std::max<int64_t>(1, TILE_ROWS / G), tiles = (num_queries + step - 1) / step;
  for (int64_t tile = tiles - 1; tile >= 0; tile--) {  // the last one sees most keys, and so goes first
    const int64_t queries = std::min(step, num_queries - tile * step);
    const int64_t position = length - num_queries + tile * step;
    const int64_t begin = std::max<int64_t>(0, position - p.window + 1), end = position + queries;
    const int64_t keys = tiles > 1 ? end - begin : SPLIT_KEYS, pieces = (end - begin + keys - 1) / keys;
    plan.work += queries * p.H * (end - begin) * P;
    for (int64_t head = 0; head < p.H; head += heads) {
      for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t from = begin + piece * keys;
        Item item{request, head, heads, first + tile * step, queries, position, from, std::min(end, from + keys)};
        item.part = pieces > 1 ? plan.part_floats : -1;
        item.by_dots = by_dots;
        item.has_sinks = p.sinks != nullptr && piece == 0;
        if (pieces > 1 && piece == 0) plan.merges.push_back({item, pieces});
        if (pieces > 1) plan.part_floats += State::size(item.rows(), P);
        plan.items.push_back(item);
      }
    }
  }
}

// Refuses what would read or write elsewhere: the lengths, and the block tables where they are read.
static void check_lengths(const Problem& p) {
  if (p.window < 1) throw std::out_of_range("sliding_window is less than 1");
  for (int64_t r = 0; r < p.R; r++) {
    const int64_t first = p.starts[r], last = p.starts[r + 1], length = p.lengths[r];
    if (first < 0 || last < first || last > p.T) throw std::out_of_range("query_start_loc isn't within the queries");
    if (first == last) continue;
    if (length < last - first || length > p.M * p.B)
      throw std::out_of_range("a context is shorter than its new tokens, or longer than its row of block_tables");
    const int64_t oldest = std::max<int64_t>(0, length - (last - first) - p.window + 1);
    for (int64_t column = oldest / p.B; column * p.B < length; column++) {
      const int32_t block = p.tables[r * p.table_stride + column];
      if (block < 0 || block >= p.N) throw std::out_of_range("block_tables names a block that isn't in the cache");
    }
  }
}

template <typename T>
static void attend(const Problem& p, const Plan& plan, float* parts) {
  const int64_t items = plan.items.size(), merges = plan.merges.size();
  if (plan.work < SERIAL_WORK || items == 1 || p.threads == 1) {
    for (int64_t i = 0; i < items; i++)
      run_item<T>(p, plan.items[i], i + 1 < items ? &plan.items[i + 1] : nullptr, parts);
    for (const Merge& merge : plan.merges) run_merge<T>(p, merge, parts);
    return;
  }
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < items; i++) {
      const int64_t next = i + p.threads;  // where threads take turns
      run_item<T>(p, plan.items[i], next < items ? &plan.items[next] : nullptr, parts);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < merges; i++) run_merge<T>(p, plan.merges[i], parts);
  }
}

static void paged_attention(const Problem& p, bool is_bfloat16) {
  check_lengths(p);
  static thread_local Plan plan;
  plan.items.clear();
  plan.merges.clear();
  plan.part_floats = plan.work = 0;
  const auto by_dots = [&](int64_t r) { return p.starts[r + 1] - p.starts[r] == 1 && p.G() <= MAX_DOT_ROWS; };
  for (int64_t r = 0; r < p.R; r++)
    if (!by_dots(r)) plan_request(p, r, false, plan);  // larger items first
  for (int64_t r = 0; r < p.R; r++)
    if (by_dots(r)) plan_request(p, r, true, plan);
  static thread_local std::vector<float> parts;
  if (static_cast<int64_t>(parts.size()) < plan.part_floats) parts.resize(plan.part_floats);
  const int64_t element = is_bfloat16 ? 2 : 4, row = p.H * p.D * element;
  int64_t written = 0;  // rows up to here have an owner or are zero
  const auto clear_until = [&](int64_t end) {
    if (end > written) std::memset(static_cast<char*>(p.out) + written * row, 0, (end - written) * row);
  };
  for (int64_t r = 0; r < p.R; r++) {
    clear_until(p.starts[r]);
    written = std::max<int64_t>(written, p.starts[r + 1]);
  }
  clear_until(p.T);
  if (is_bfloat16) {
    attend<BFloat16>(p, plan, parts.data());
  } else {
    attend<float>(p, plan, parts.data());
  }
}

static void run_paged_attention(
    void* out, const void* q, const void* k_cache, const void* v_cache, const int32_t* tables, const int32_t* starts,
    const int32_t* lengths, Optional<const void> sinks, int64_t T, int64_t H, int64_t D, int64_t N, int64_t B, int64_t K,
    int64_t R, int64_t M, int64_t token_stride, int64_t head_stride, int64_t table_stride, float scale, int64_t window,
    float softcap, int64_t threads, bool is_bfloat16) {
  const Problem p{
      out, q, k_cache, v_cache, tables, starts, lengths, sinks.pointer, T, H, D, N, B, K, R, M, token_stride, head_stride,
      table_stride, scale, window, softcap, threads};
  paged_attention(p, is_bfloat16);
}

}  // namespace onegraph
