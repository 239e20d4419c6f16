// The extension module of the kernels for onegraph's own ops.
template <auto KERNEL>
static const char* name_of = nullptr;

template <auto KERNEL>
static PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return onegraph::Kernel<KERNEL>::call(name_of<KERNEL>, given, count);
}

template <auto KERNEL>
static PyMethodDef function(const char* name) {
  name_of<KERNEL> = name;
  return {name, reinterpret_cast<PyCFunction>(call<KERNEL>), METH_FASTCALL, nullptr};
}

static PyMethodDef methods[] = {
    {"bind", onegraph::bind, METH_VARARGS, nullptr},
    function<onegraph::run_paged_attention>("paged_attention"),
    function<onegraph::run_write_kv_cache>("write_kv_cache"),
    function<onegraph::run_rotary>("rotary"),
    function<onegraph::run_largest>("largest"),
    function<onegraph::run_linear<onegraph::linear_by_vectors<float>>>("linear_float"),
    function<onegraph::run_linear<onegraph::linear_by_vectors<onegraph::BFloat16>>>("linear_bfloat16"),
#if defined(ONEGRAPH_BLOCKED)
    function<onegraph::run_linear<onegraph::linear_by_blocks<float>>>("linear_by_blocks_float"),
    function<onegraph::run_linear<onegraph::linear_by_blocks<onegraph::BFloat16>>>("linear_by_blocks_bfloat16"),
#endif
#if defined(ONEGRAPH_AMX)
    function<onegraph::run_linear<onegraph::linear_by_matrices>>("linear_by_matrices"),
    function<onegraph::check_matrices>("check_matrices"),
#endif
    {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "onegraph_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit_onegraph_kernels(void) { return PyModule_Create(&definition); }
