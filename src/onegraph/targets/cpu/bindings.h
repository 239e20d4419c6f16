// What the Python bindings of one library of kernels share: arguments from Python to C++.
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

// Python's headers are a package of their own that a machine with Python and g++ may lack. What is used here is in
// the stable ABI (docs.python.org/3/c-api/stable.html; METH_FASTCALL since 3.10), which never changes within
// Python 3, and so is declared by hand.
#ifndef Py_PYTHON_H
using Py_ssize_t = std::ptrdiff_t;
struct PyObject;
using PyCFunction = PyObject* (*)(PyObject*, PyObject*);
struct PyMethodDef {
  const char* name;
  PyCFunction function;
  int flags;
  const char* doc;
};
struct PyModuleDef_Base {
  Py_ssize_t reference_count;
  void* type;
  PyObject* (*init)();
  Py_ssize_t index;
  PyObject* copy;
};
struct PyModuleDef {
  PyModuleDef_Base base;
  const char* name;
  const char* doc;
  Py_ssize_t size;
  PyMethodDef* methods;
  void *slots, *traverse, *clear, *free;
};
extern "C" {
extern PyObject _Py_NoneStruct;
extern PyObject* PyExc_TypeError;
extern PyObject* PyExc_RuntimeError;
void Py_IncRef(PyObject*);
double PyFloat_AsDouble(PyObject*);
long long PyLong_AsLongLong(PyObject*);
unsigned long long PyLong_AsUnsignedLongLong(PyObject*);
void* PyLong_AsVoidPtr(PyObject*);
int PyObject_IsTrue(PyObject*);
PyObject* PyErr_Occurred();
PyObject* PyErr_Format(PyObject*, const char*, ...);
void PyErr_SetString(PyObject*, const char*);
PyObject* PyModule_Create2(PyModuleDef*, int);
}
#define METH_O 0x0008
#define METH_FASTCALL 0x0080
#define PyModuleDef_HEAD_INIT {1, nullptr, nullptr, 0, nullptr}
#define PyModule_Create(definition) PyModule_Create2(definition, 3)
#define PyMODINIT_FUNC extern "C" PyObject*
#define Py_RETURN_NONE return Py_IncRef(&_Py_NoneStruct), &_Py_NoneStruct
#endif

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

// Reads a Python call's arguments in their order.
struct Arguments {
  PyObject* const* next;
  template <typename T>
  T take() {
    return argument<T>(*next++);
  }
  const void* take_optional() { return *next == &_Py_NoneStruct ? (next++, nullptr) : take<const void*>(); }
};

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
