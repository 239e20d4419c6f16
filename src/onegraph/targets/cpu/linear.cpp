// How Python calls the kernels of `onegraph::linear`.

namespace onegraph {

template <void (*RUN)(const Linear&)>
static PyObject* call_linear(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return guarded(count, 10, [&] {
    Arguments args{given};
    Linear p;
    p.out = args.take<void*>();
    p.x = args.take<const void*>();
    p.weight = args.take<const void*>();
    p.bias = args.take_optional();
    for (int64_t* size : {&p.T, &p.O, &p.I, &p.x_stride, &p.weight_stride, &p.threads}) *size = args.take<int64_t>();
    RUN(p);
  });
}

#if defined(ONEGRAPH_AMX)
// Raises where the system doesn't let this process use matrix instructions.
static PyObject* call_check_matrices(PyObject*, PyObject* const*, Py_ssize_t count) {
  return guarded(count, 0, [] {
    if (!amx_is_allowed()) throw std::runtime_error("this process can't use matrix instructions");
  });
}
#endif

}  // namespace onegraph
