// The write of keys and values into the paged KV cache: `onegraph::write_kv_cache`, for any dtype.
//
// Letters: T tokens, K key-value heads.

namespace onegraph {

struct Written {
  const char* from;
  char* cache;
  int64_t token_stride, head_stride;  // bytes
};

// `head_bytes` are those of one head of one token. Rows whose slot is negative are left out.
static void write_kv_cache(
    const Written (&both)[2], const int64_t* slots, int64_t T, int64_t K, int64_t head_bytes, int64_t num_slots,
    int64_t threads) {
  for (int64_t t = 0; t < T; t++)
    if (slots[t] >= num_slots) throw std::out_of_range("slot_mapping names a slot that isn't in the cache");
#pragma omp parallel for num_threads(threads) if (threads > 1 && T * K * head_bytes > (1 << 20))
  for (int64_t t = 0; t < T; t++) {
    if (slots[t] < 0) continue;
    for (const Written& one : both)
      for (int64_t head = 0; head < K; head++)
        std::memcpy(
            one.cache + (slots[t] * K + head) * head_bytes,
            one.from + t * one.token_stride + head * one.head_stride, head_bytes);
  }
}

static void run_write_kv_cache(
    const char* k, char* k_cache, int64_t k_token_stride, int64_t k_head_stride, const char* v, char* v_cache,
    int64_t v_token_stride, int64_t v_head_stride, const int64_t* slots, int64_t T, int64_t K, int64_t head_bytes,
    int64_t num_slots, int64_t threads) {
  const Written both[2] = {
      {k, k_cache, k_token_stride, k_head_stride}, {v, v_cache, v_token_stride, v_head_stride}};
  write_kv_cache(both, slots, T, K, head_bytes, num_slots, threads);
}

}  // namespace onegraph
