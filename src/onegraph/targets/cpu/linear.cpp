// How Python calls the kernels of `onegraph::linear`.

namespace onegraph {

template <void (*RUN)(const Linear&)>
static void run_linear(
    void* out, const void* x, const void* weight, Optional<const void> bias, int64_t T, int64_t O, int64_t I,
    int64_t x_stride, int64_t weight_stride, int64_t threads) {
  RUN({out, x, weight, bias.pointer, T, O, I, x_stride, weight_stride, threads});
}

#if defined(ONEGRAPH_AMX)
// Raises where the system doesn't let this process use matrix instructions.
static void check_matrices() {
  if (!amx_is_allowed()) throw std::runtime_error("this process can't use matrix instructions");
}
#endif

}  // namespace onegraph
