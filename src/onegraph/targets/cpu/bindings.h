// What the Python bindings of one library of kernels share: arguments from Python to C++.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace onegraph {

// Torch's function from a tensor to its data pointer; set by bind() before the first kernel call.
static void* (*tensor_data_pointer)(PyObject*) = nullptr;

template <typename T>
static inline T argument(PyObject* value) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(tensor_data_pointer(value));
  } else if constexpr (std::is_floating_point_v<T>) {
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) throw std::runtime_error("a kernel expected a float");
    return static_cast<T>(number);
  } else if constexpr (std::is_same_v<T, bool>) {
    return PyObject_IsTrue(value) == 1;
  } else if constexpr (std::is_unsigned_v<T>) {
    const unsigned long long number = PyLong_AsUnsignedLongLong(value);
    if (number == static_cast<unsigned long long>(-1) && PyErr_Occurred())
      throw std::runtime_error("a kernel expected an unsigned integer");
    return static_cast<T>(number);
  } else {
    const long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) throw std::runtime_error("a kernel expected an integer");
    return static_cast<T>(number);
  }
}

template <typename F>
static PyObject* guarded(Py_ssize_t given, Py_ssize_t expected, F&& body) {
  if (given != expected) {
    PyErr_Format(PyExc_TypeError, "a kernel takes %zd arguments, got %zd", expected, given);
    return nullptr;
  }
  try {
    body();
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "a kernel failed without a reason");
    return nullptr;
  }
  Py_RETURN_NONE;
}

static PyObject* bind(PyObject*, PyObject* address) {
  tensor_data_pointer = reinterpret_cast<void* (*)(PyObject*)>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

}  // namespace onegraph
