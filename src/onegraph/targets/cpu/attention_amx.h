// Attention by matrix instructions (AMX), for bf16 and heads of whole pairs of vectors (D % 32 == 0).
//
// Scores stand keys first: scores[key, row] = keys[key, :] . queries[row, :]. So keys are multiplied where they lie in
// the cache, the softmax runs over vectors of rows without a sum across lanes, and pairs of weights are at once in the
// form that the values are multiplied with. Products are exact and summed in fp32; weights are rounded to bf16, as
// SDPA's are, and their sum is that of the rounded ones.
#if defined(ONEGRAPH_AMX)
namespace onegraph {

constexpr int64_t CHUNK_KEYS = 128;          // keys that are weighed at a time
constexpr int64_t AT_ONCE = 4;               // tiles of keys whose scores are summed at a time
constexpr int64_t CHUNK_TILES = CHUNK_KEYS / EDGE;

// Rounded to bf16, whose bits stand in the lower halves.
static inline Words rounded(Floats value) {
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value))));
}

// 2^x for x <= 0, far nearer than a bf16 tells; NaN stays NaN, and what underflows is 0.
static inline Floats exp2_for_bf16(Floats x) {
  const Floats fraction = _mm512_reduce_ps(x, 0);
  Floats power = fraction * 0.0095828512f + 0.055906432f;
  power = power * fraction + 0.24024099f;
  power = power * fraction + 0.69312419f;
  power = power * fraction + 1.0f;
  return _mm512_scalef_ps(power, x - fraction);
}

// Sixteen keys, `stride` bytes apart.
struct KeyTile {
  const BFloat16* first;
  int64_t stride;
};

// The keys of a chunk in tiles, each `width` elements that begin `from` elements after its row: where they lie, if a
// block holds the whole tile, else as copies, with zeros after the last. What a block holds beyond `count` is in the
// tile too: its scores have to be hidden. Gives the number of tiles.
static int64_t find_tiles(
    const Problem& p, const BFloat16* const* rows, int64_t place, int64_t count, int64_t from, int64_t width,
    BFloat16* copies, KeyTile* tiles) {
  const int64_t num_tiles = (count + EDGE - 1) / EDGE;
  for (int64_t tile = 0; tile < num_tiles; tile++) {
    const int64_t first = tile * EDGE;
    if (p.B % EDGE == 0 && (place + first) % EDGE == 0) {
      tiles[tile] = {rows[first] + from, p.K * p.D * 2};
      continue;
    }
    BFloat16* to = copies + first * width;
    tiles[tile] = {to, width * 2};
    for (int64_t i = 0; i < EDGE; i++, to += width) {
      if (first + i < count) {
        std::memcpy(to, rows[first + i] + from, width * 2);
      } else {
        std::memset(static_cast<void*>(to), 0, width * 2);
      }
    }
  }
  return num_tiles;
}

// scores[key, row] of up to four tiles of keys and one of rows, over `steps` times 32 elements of both.
static inline void score_tiles(
    const KeyTile* keys, int64_t num_tiles, int64_t from, const BFloat16* queries, int64_t steps, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++, from += DEEP, queries += MATRIX) {
    _tile_loadd(7, queries, 64);
    _tile_loadd(4, keys[0].first + from, keys[0].stride);
    _tile_dpbf16ps(0, 4, 7);
    if (num_tiles > 1) {
      _tile_loadd(5, keys[1].first + from, keys[1].stride);
      _tile_dpbf16ps(1, 5, 7);
    }
    if (num_tiles > 2) {
      _tile_loadd(6, keys[2].first + from, keys[2].stride);
      _tile_dpbf16ps(2, 6, 7);
    }
    if (num_tiles > 3) {
      _tile_loadd(4, keys[3].first + from, keys[3].stride);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, scores, 64);
  if (num_tiles > 1) _tile_stored(1, scores + EDGE * EDGE, 64);
  if (num_tiles > 2) _tile_stored(2, scores + 2 * EDGE * EDGE, 64);
  if (num_tiles > 3) _tile_stored(3, scores + 3 * EDGE * EDGE, 64);
}

static inline void score_rows(
    const KeyTile* tiles, int64_t num_tiles, int64_t from, const BFloat16* queries, int64_t steps, float* scores) {
  memory_is_written();
  for (int64_t tile = 0; tile < num_tiles; tile += AT_ONCE)
    score_tiles(
        tiles + tile, std::min(AT_ONCE, num_tiles - tile), from, queries, steps, scores + tile * EDGE * EDGE);
  memory_is_written();
}

// Sixteen rows' scores as pairs of bf16 weights, pairs[key / 2, row], and the update of the rows' state; gives the
// factor for the sums so far. A row sees the keys from `begin` up to `end`, where `is_partial`, else all.
static inline Floats weigh_rows(
    const Problem& p, float* scores, int64_t num_keys, bool is_partial, Ints begin, Ints end, Floats& most,
    Floats& total, uint32_t* pairs) {
  const float scale = p.scale * LOG2_E, inside = p.softcap == 0 ? 0 : p.scale / p.softcap, outside = p.softcap * LOG2_E;
  Floats now = most;
  for (int64_t key = 0; key < num_keys; key++) {
    Floats some = load(scores + key * W);
    some = p.softcap == 0 ? some * scale : tanh(some * inside) * outside;
    const int32_t place = static_cast<int32_t>(key);
    if (is_partial) some = (begin > place) | (end <= place) ? Floats{} + NOTHING : some;
    store(scores + key * W, some);
    now = some > now ? some : now;
  }
  const Floats base = now == NOTHING ? Floats{} : now;
  const Floats factor = most == now ? Floats{} + 1.0f : exp2_below_one(most - base);
  Floats sum{};
  for (int64_t key = 0; key < num_keys; key += 2) {
    const Words low = rounded(exp2_for_bf16(load(scores + key * W) - base));
    const Words high = rounded(exp2_for_bf16(load(scores + key * W + W) - base)) << 16;
    sum += reinterpret_cast<Floats>(low << 16) + reinterpret_cast<Floats>(high);
    store(reinterpret_cast<float*>(pairs) + key / 2 * W, reinterpret_cast<Floats>(low | high));
  }
  total = total * factor + sum;
  most = now;
  return factor;
}

// Adds the values of keys, with pairs of weights [pair, 16] of HEADS heads, to the sums of NV vectors. Two keys' values
// are interleaved for that, so that of 32 sums those of 0-3, 8-11, 16-19 and 24-27 stand first, until `in_order`.
template <int HEADS, int NV>
static inline void add_pairs(
    float* to, const uint32_t* weights, const BFloat16* const* values, int64_t from, int64_t count, int64_t P) {
  Floats sum[HEADS][NV];
  for (int h = 0; h < HEADS; h++)
    for (int j = 0; j < NV; j++) sum[h][j] = load(to + h * P + j * W);
  for (int64_t i = 0; i < count; i += 2) {
    __m512i both[NV];
    for (int j = 0; j < NV; j += 2) {
      const __m512i one = _mm512_loadu_si512(values[i] + from + j * W);
      const __m512i next = i + 1 < count ? _mm512_loadu_si512(values[i + 1] + from + j * W) : _mm512_setzero_si512();
      both[j] = _mm512_unpacklo_epi16(one, next);
      both[j + 1] = _mm512_unpackhi_epi16(one, next);
    }
    for (int h = 0; h < HEADS; h++) {
      const __m512i weight = _mm512_set1_epi32(static_cast<int32_t>(weights[i / 2 * W + h]));
      for (int j = 0; j < NV; j++)
        sum[h][j] = _mm512_dpbf16_ps(
            sum[h][j], reinterpret_cast<__m512bh>(both[j]), reinterpret_cast<__m512bh>(weight));
    }
  }
  for (int h = 0; h < HEADS; h++)
    for (int j = 0; j < NV; j++) store(to + h * P + j * W, sum[h][j]);
}

static inline void in_order(float* sums, int64_t size) {
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t d = 0; d < size; d += 2 * W) {
    const Floats one = load(sums + d), other = load(sums + d + W);
    store(sums + d, static_cast<Floats>(_mm512_permutex2var_ps(one, low, other)));
    store(sums + d + W, static_cast<Floats>(_mm512_permutex2var_ps(one, high, other)));
  }
}

// Has rows of `size` elements brought near, which the processor doesn't guess across blocks.
static inline void fetch_rows(const BFloat16* const* rows, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t at = 0; at < size; at += 32) __builtin_prefetch(rows[i] + at, 0, 2);
}

// One query with all heads. Several key-value heads share a tile of rows: each query stands in the column of its head,
// and has zeros where other heads' keys are, so that one sum over the heads gives all their scores. (So a key that is
// infinite or NaN makes its token's scores NaN under the other heads of that tile, too.)
// `next` is the item that comes after this one, or null: its keys are fetched meanwhile.
static void attend_one_by_matrices(
    const Problem& p, const Item& item, const Item* next, State state, float* memory) {
  const int64_t G = p.G(), D = p.D, steps = D / DEEP, width = p.K * D;
  const int64_t together = EDGE / G, tiles_of_heads = (p.K + together - 1) / together;
  float* scores = memory;                                                           // [tile of heads, key, 16]
  uint32_t* pairs = reinterpret_cast<uint32_t*>(scores + tiles_of_heads * CHUNK_KEYS * W);  // [.., key / 2, 16]
  BFloat16* queries = reinterpret_cast<BFloat16*>(pairs + tiles_of_heads * CHUNK_KEYS / 2 * W);  // [K, steps, 16, 32]
  BFloat16* copies = queries + p.K * steps * MATRIX;
  std::memset(static_cast<void*>(queries), 0, p.K * steps * MATRIX * 2);
  for (int64_t head = 0; head < p.H; head++) {
    const int64_t column = head / G % together * G + head % G;
    const BFloat16* from = static_cast<const BFloat16*>(p.q) + item.first_token * p.token_stride + head * p.head_stride;
    BFloat16* to = queries + head / G * steps * MATRIX + column * 2;
    for (int64_t pair = 0; pair < D / 2; pair++) std::memcpy(static_cast<void*>(to + pair * DEEP), from + pair * 2, 4);
  }
  const BFloat16 *keys[CHUNK_KEYS], *values[CHUNK_KEYS], *later[CHUNK_KEYS];
  KeyTile tiles[CHUNK_TILES];
  int64_t count;
  const auto chunk = [](const Item& of, int64_t place) {
    return std::min(place / CHUNK_KEYS * CHUNK_KEYS + CHUNK_KEYS, of.end) - place;
  };
  for (int64_t place = item.begin; place < item.end; place += count) {
    count = chunk(item, place);
    find_rows(p, static_cast<const BFloat16*>(p.k_cache), item.request, place, count, keys);
    const Item* following = place + count < item.end ? &item : next;
    const int64_t then = following == &item ? place + count : following ? following->begin : 0;
    const int64_t num_later = following ? chunk(*following, then) : 0;
    if (num_later)
      find_rows(p, static_cast<const BFloat16*>(p.k_cache), following->request, then, num_later, later);
    find_rows(p, static_cast<const BFloat16*>(p.v_cache), item.request, place, count, values);
    fetch_rows(values, count, width);  // is on its way while the keys are multiplied
    const int64_t num_tiles = find_tiles(p, keys, place, count, 0, width, copies, tiles);
    for (int64_t part = 0; part < tiles_of_heads; part++) {
      const int64_t first = part * together, heads = std::min(together, p.K - first), row = first * G;
      float* own = scores + part * CHUNK_KEYS * W;
      score_rows(tiles, num_tiles, first * D, queries + first * steps * MATRIX, heads * steps, own);
      const __mmask16 some = static_cast<__mmask16>((1u << heads * G) - 1);
      Floats most = _mm512_maskz_loadu_ps(some, state.most + row);
      Floats total = _mm512_maskz_loadu_ps(some, state.total + row);
      const Ints end = Ints{} + static_cast<int32_t>(count);
      const Floats factor = weigh_rows(
          p, own, num_tiles * EDGE, count % EDGE != 0, Ints{}, end, most, total, pairs + part * CHUNK_KEYS / 2 * W);
      _mm512_mask_storeu_ps(state.most + row, some, most);
      _mm512_mask_storeu_ps(state.total + row, some, total);
      for (int64_t i = 0; i < heads * G; i++) {
        if (factor[i] == 1) continue;
        float* sums = state.sums + (row + i) * D;
        for (int64_t d = 0; d < D; d += W) store(sums + d, load(sums + d) * factor[i]);
      }
    }
    for (int64_t i = 0; i < count; i += CHUNK) {
      const int64_t few = std::min<int64_t>(CHUNK, count - i);
      const int64_t until = i + CHUNK < count ? i + CHUNK : CHUNK_KEYS;
      fetch_rows(later + i, std::clamp<int64_t>(num_later - i, 0, until - i), width);
      for (int64_t kv_head = 0; kv_head < p.K; kv_head++)
        for_shared_heads(G, [&](int64_t g, auto heads) {
          const int64_t column = kv_head % together * G + g, from = kv_head * D;
          const uint32_t* own = pairs + (kv_head / together * CHUNK_KEYS + i) / 2 * W + column;
          float* to = state.sums + (kv_head * G + g) * D;
          int64_t d = 0;
          for (; d + 4 * W <= D; d += 4 * W) add_pairs<heads.value, 4>(to + d, own, values + i, from + d, few, D);
          for (; d < D; d += 2 * W) add_pairs<heads.value, 2>(to + d, own, values + i, from + d, few, D);
        });
    }
  }
  in_order(state.sums, p.H * D);
}

// Values of one head as the sums are multiplied from them: turned[d, key], zeros after the last key.
static void turn_values(const BFloat16* const* rows, int64_t from, int64_t count, int64_t D, BFloat16* turned) {
  const auto of = [&](int64_t key, int64_t d) {
    return key < count ? _mm512_loadu_si512(rows[key] + from + d) : _mm512_setzero_si512();
  };
  for (int64_t key = 0; key < count; key += DEEP)
    for (int64_t d = 0; d < D; d += DEEP) {
      __m512i low[EDGE], high[EDGE];
      for (int i = 0; i < EDGE; i++) {
        const __m512i one = of(key + 2 * i, d), next = of(key + 2 * i + 1, d);
        low[i] = _mm512_unpacklo_epi16(one, next);
        high[i] = _mm512_unpackhi_epi16(one, next);
      }
      transpose(low);
      transpose(high);
      for (int i = 0; i < EDGE; i++) {
        BFloat16* to = turned + (d + i / 4 * 8 + i % 4) * CHUNK_KEYS + key;
        _mm512_storeu_si512(to, low[i]);
        _mm512_storeu_si512(to + 4 * CHUNK_KEYS, high[i]);
      }
    }
}

// sums[d, row] += turned[d, key] weights[key, row], for up to four tiles of d.
static inline void add_turned(
    float* sums, const BFloat16* turned, const uint32_t* pairs, int64_t num_tiles, int64_t num_keys) {
  constexpr int64_t STRIDE = CHUNK_KEYS * 2;
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + EDGE * EDGE, 64);
  if (num_tiles > 2) {
    _tile_loadd(2, sums + 2 * EDGE * EDGE, 64);
    _tile_loadd(3, sums + 3 * EDGE * EDGE, 64);
  }
  for (int64_t key = 0; key < num_keys; key += DEEP, turned += DEEP, pairs += EDGE * EDGE) {
    _tile_loadd(7, pairs, 64);
    _tile_loadd(4, turned, STRIDE);
    _tile_dpbf16ps(0, 4, 7);
    _tile_loadd(5, turned + EDGE * CHUNK_KEYS, STRIDE);
    _tile_dpbf16ps(1, 5, 7);
    if (num_tiles > 2) {
      _tile_loadd(6, turned + 2 * EDGE * CHUNK_KEYS, STRIDE);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(4, turned + 3 * EDGE * CHUNK_KEYS, STRIDE);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + EDGE * EDGE, 64);
  if (num_tiles > 2) {
    _tile_stored(2, sums + 2 * EDGE * EDGE, 64);
    _tile_stored(3, sums + 3 * EDGE * EDGE, 64);
  }
}

// Queries of the heads that share a key-value head, sixteen rows at a time, whose sums stand d first: [tile, D, 16].
static void attend_by_matrices(const Problem& p, const Item& item, State state, float* memory) {
  const int64_t G = p.G(), D = p.D, steps = D / DEEP, rows = item.rows(), row_tiles = (rows + EDGE - 1) / EDGE;
  const int64_t from = item.first_head / G * D;
  float* sums = memory;
  float* scores = sums + row_tiles * D * W;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(scores + CHUNK_KEYS * W);
  BFloat16* turned = reinterpret_cast<BFloat16*>(pairs + CHUNK_KEYS / 2 * W);
  BFloat16* queries = turned + D * CHUNK_KEYS;  // [tile, steps, 16, 32]
  BFloat16* copies = queries + row_tiles * steps * MATRIX;
  std::memset(sums, 0, row_tiles * D * W * sizeof(float));
  std::memset(static_cast<void*>(queries + (row_tiles - 1) * steps * MATRIX), 0, steps * MATRIX * 2);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = item.first_token + row / G, head = item.first_head + row % G;
    const BFloat16* query = static_cast<const BFloat16*>(p.q) + token * p.token_stride + head * p.head_stride;
    BFloat16* to = queries + row / EDGE * steps * MATRIX + row % EDGE * 2;
    for (int64_t pair = 0; pair < D / 2; pair++) std::memcpy(static_cast<void*>(to + pair * DEEP), query + pair * 2, 4);
  }
  const BFloat16* found[CHUNK_KEYS];
  KeyTile tiles[CHUNK_TILES];
  int64_t count;
  for (int64_t place = item.begin; place < item.end; place += count) {
    count = std::min(place / CHUNK_KEYS * CHUNK_KEYS + CHUNK_KEYS, item.end) - place;
    find_rows(p, static_cast<const BFloat16*>(p.v_cache), item.request, place, count, found);
    turn_values(found, from, count, D, turned);
    find_rows(p, static_cast<const BFloat16*>(p.k_cache), item.request, place, count, found);
    find_tiles(p, found, place, count, from, D, copies, tiles);
    for (int64_t tile = 0; tile < row_tiles; tile++) {
      const int64_t row = tile * EDGE, last_row = std::min(rows, row + EDGE) - 1;
      const int64_t first = item.first_position + row / G, last = item.first_position + last_row / G;
      const int64_t seen = std::min(count, last + 1 - place), hidden = first - p.window + 1 - place;
      if (seen <= 0 || hidden >= count) continue;
      const int64_t num_tiles = (seen + EDGE - 1) / EDGE, num_keys = num_tiles * EDGE;
      score_rows(tiles, num_tiles, 0, queries + tile * steps * MATRIX, steps, scores);
      Ints begin, end;
      for (int i = 0; i < W; i++) {
        const int64_t position = item.first_position + (row + i) / G;
        end[i] = static_cast<int32_t>(std::min(count, position + 1 - place));
        begin[i] = static_cast<int32_t>(std::clamp<int64_t>(position - p.window + 1 - place, 0, count));
      }
      const bool is_partial = num_keys > std::min(count, first + 1 - place) || last - p.window + 1 > place;
      const __mmask16 some = static_cast<__mmask16>((1u << (last_row + 1 - row)) - 1);
      Floats most = _mm512_maskz_loadu_ps(some, state.most + row);
      Floats total = _mm512_maskz_loadu_ps(some, state.total + row);
      const Floats factor = weigh_rows(p, scores, num_keys, is_partial, begin, end, most, total, pairs);
      _mm512_mask_storeu_ps(state.most + row, some, most);
      _mm512_mask_storeu_ps(state.total + row, some, total);
      if (num_tiles % 2) std::memset(pairs + num_keys / 2 * W, 0, EDGE / 2 * W * sizeof(uint32_t));
      float* own = sums + tile * D * W;
      if (_mm512_cmp_ps_mask(factor, _mm512_set1_ps(1), _CMP_NEQ_UQ))
        for (int64_t d = 0; d < D; d++) store(own + d * W, load(own + d * W) * factor);
      memory_is_written();
      for (int64_t d = 0; d < D; d += 4 * EDGE)
        add_turned(own + d * W, turned + d * CHUNK_KEYS, pairs, std::min<int64_t>(4, (D - d) / EDGE), num_keys);
      memory_is_written();
    }
  }
  for (int64_t tile = 0; tile < row_tiles; tile++)
    for (int64_t d = 0; d < D; d += EDGE) {
      __m512i turned_back[EDGE];
      for (int i = 0; i < EDGE; i++) turned_back[i] = _mm512_loadu_si512(sums + (tile * D + d + i) * W);
      transpose(turned_back);
      for (int64_t i = 0; i < std::min(EDGE, rows - tile * EDGE); i++)
        _mm512_storeu_si512(state.sums + (tile * EDGE + i) * D + d, turned_back[i]);
    }
}

static bool uses_matrices(const Problem& p) { return p.D % DEEP == 0 && amx_is_allowed(); }

// The floats of memory that an item needs.
static int64_t matrix_memory(const Problem& p, const Item& item) {
  const int64_t D = p.D;
  if (item.by_dots) {
    const int64_t together = EDGE / p.G(), tiles = (p.K + together - 1) / together;
    return tiles * CHUNK_KEYS * W * 3 / 2 + p.K * D * (EDGE + CHUNK_KEYS) / 2;
  }
  const int64_t tiles = (item.rows() + EDGE - 1) / EDGE;
  return tiles * D * W * 3 / 2 + CHUNK_KEYS * W * 3 / 2 + D * CHUNK_KEYS;
}

}  // namespace onegraph
#endif
