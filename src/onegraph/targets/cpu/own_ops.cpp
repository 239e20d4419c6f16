// The extension module of the kernels for onegraph's own ops.
static PyMethodDef function(const char* name, PyObject* (*call)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return {name, reinterpret_cast<PyCFunction>(call), METH_FASTCALL, nullptr};
}

static PyMethodDef methods[] = {
    {"bind", onegraph::bind, METH_O, nullptr},
    function("paged_attention", onegraph::call_paged_attention),
    function("write_kv_cache", onegraph::call_write_kv_cache),
    function("rotary", onegraph::call_rotary),
    function("largest", onegraph::call_largest),
    function("linear_float", onegraph::call_linear<onegraph::linear_by_vectors<float>>),
    function("linear_bfloat16", onegraph::call_linear<onegraph::linear_by_vectors<onegraph::BFloat16>>),
#if defined(ONEGRAPH_AMX)
    function("linear_by_matrices", onegraph::call_linear<onegraph::linear_by_matrices>),
    function("check_matrices", onegraph::call_check_matrices),
#endif
    {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "onegraph_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit_onegraph_kernels(void) { return PyModule_Create(&definition); }
