// The largest number of each row and where it stands: `onegraph::largest`, for fp32 and bf16.
//
// Letters: S rows, V numbers in a row.

namespace onegraph {

constexpr int64_t SERIAL_NUMBERS = 1 << 16;  // that take less time than starting threads

// The first of the largest; NaN is larger than any number.
template <typename T>
static int64_t first_largest(const T* row, int64_t V) {
  constexpr int SUMS = 4;  // so that comparisons needn't wait for one another
  Floats most[SUMS];
  Ints place[SUMS], at[SUMS], lanes;
  for (int i = 0; i < W; i++) lanes[i] = i;
  for (int j = 0; j < SUMS; j++) {
    most[j] = Floats{} - std::numeric_limits<float>::infinity();
    at[j] = place[j] = lanes + j * W;
  }
  Ints is_nan{};
  int64_t v = 0;
  for (; v + SUMS * W <= V; v += SUMS * W)
    for (int j = 0; j < SUMS; j++) {
      const Floats some = load(row + v + j * W);
      const Ints more = some > most[j];
      is_nan |= some != some;
      most[j] = more ? some : most[j];
      place[j] = more ? at[j] : place[j];
      at[j] += SUMS * W;
    }
  float best = -std::numeric_limits<float>::infinity();
  int64_t found = 0;
  bool has_nan = false;
  for (int i = 0; i < W; i++) has_nan |= is_nan[i] != 0;
  for (int64_t rest = v; rest < V; rest++) has_nan |= to_float(row[rest]) != to_float(row[rest]);
  if (has_nan) {
    while (to_float(row[found]) == to_float(row[found])) found++;
    return found;
  }
  for (int j = 0; j < SUMS && v > 0; j++)
    for (int i = 0; i < W; i++)
      if (most[j][i] > best || (most[j][i] == best && place[j][i] < found)) {
        best = most[j][i];
        found = place[j][i];
      }
  for (; v < V; v++)
    if (to_float(row[v]) > best) {
      best = to_float(row[v]);
      found = v;
    }
  return found;
}

template <typename T>
static void largest(int64_t* indices, const T* x, int64_t S, int64_t V, int64_t stride, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (S > 1 && S * V > SERIAL_NUMBERS)
  for (int64_t row = 0; row < S; row++) indices[row] = first_largest(x + row * stride, V);
}

static void run_largest(
    int64_t* indices, const void* x, int64_t S, int64_t V, int64_t stride, int64_t threads, bool is_bfloat16) {
  if (is_bfloat16) {
    largest(indices, static_cast<const BFloat16*>(x), S, V, stride, threads);
  } else {
    largest(indices, static_cast<const float*>(x), S, V, stride, threads);
  }
}

}  // namespace onegraph
