// What the Python bindings of one library of kernels share: calls from Python, which can be recorded and replayed.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>

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
void Py_DecRef(PyObject*);
double PyFloat_AsDouble(PyObject*);
long long PyLong_AsLongLong(PyObject*);
unsigned long long PyLong_AsUnsignedLongLong(PyObject*);
void* PyLong_AsVoidPtr(PyObject*);
PyObject* PyLong_FromVoidPtr(void*);
PyObject* PyUnicode_FromString(const char*);
PyObject* PyBytes_FromStringAndSize(const char*, Py_ssize_t);
PyObject* PyTuple_New(Py_ssize_t);
PyObject* PyTuple_GetItem(PyObject*, Py_ssize_t);
int PyTuple_SetItem(PyObject*, Py_ssize_t, PyObject*);
int PyList_Append(PyObject*, PyObject*);
unsigned long PyThread_get_thread_ident();
int PyObject_IsTrue(PyObject*);
PyObject* PyErr_Occurred();
PyObject* PyErr_Format(PyObject*, const char*, ...);
void PyErr_SetString(PyObject*, const char*);
PyObject* PyModule_Create2(PyModuleDef*, int);
}
#define METH_VARARGS 0x0001
#define METH_FASTCALL 0x0080
#define PyModuleDef_HEAD_INIT {1, nullptr, nullptr, 0, nullptr}
#define PyModule_Create(definition) PyModule_Create2(definition, 3)
#define PyMODINIT_FUNC extern "C" PyObject*
#define Py_RETURN_NONE return Py_IncRef(&_Py_NoneStruct), &_Py_NoneStruct
#endif

namespace onegraph {

// A kernel's call that can be done again: `run` reads the arguments from its words.
struct RecordedCall {
  void (*run)(const uint64_t* words);
  const uint64_t* words;
};

// Does calls again, in order and without Python. Gives how many were done; why no more were stands in `reason`.
static int64_t replay_calls(const RecordedCall* calls, int64_t num_calls, char* reason, int64_t size) noexcept {
  int64_t done = 0;
  try {
    for (; done < num_calls; done++) calls[done].run(calls[done].words);
  } catch (const std::exception& error) {
    std::strncpy(reason, error.what(), size - 1);
  } catch (...) {
    std::strncpy(reason, "it failed without a reason", size - 1);
  }
  return done;
}

// What all libraries share with the recorder in Python (tape.py), which owns it.
struct Tape {
  PyObject* calls;       // the list that calls are appended to; null while nothing is recorded
  unsigned long thread;  // whose calls they are, by Python's number
  decltype(&replay_calls) replay;
};

// Torch's function from a tensor to its data pointer, and the tape; set by bind() before the first kernel call.
static void* (*tensor_data_pointer)(PyObject*) = nullptr;
static Tape* tape = nullptr;

// An argument that may be None.
template <typename T>
struct Optional {
  T* pointer;
};
template <typename T>
constexpr bool is_optional = false;
template <typename T>
constexpr bool is_optional<Optional<T>> = true;

template <typename T>
static inline T argument(PyObject* value) {
  if constexpr (is_optional<T>) {
    return {value == &_Py_NoneStruct ? nullptr : argument<decltype(T::pointer)>(value)};
  } else if constexpr (std::is_pointer_v<T>) {
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

// An argument as a word of a recorded call, and back.
template <typename T>
static inline uint64_t word_of(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <typename T>
static inline T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
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

// Appends (kernel, address of `run`, words as bytes, tensors) to the tape.
static void record(
    const char* kernel, void (*run)(const uint64_t*), const uint64_t* words, Py_ssize_t num_words,
    PyObject* const* given, const bool* points) {
  Py_ssize_t num_tensors = 0;
  for (Py_ssize_t i = 0; i < num_words; i++) num_tensors += points[i] && given[i] != &_Py_NoneStruct;
  PyObject* parts[] = {
      PyUnicode_FromString(kernel), PyLong_FromVoidPtr(reinterpret_cast<void*>(run)),
      PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words), num_words * sizeof(uint64_t)),
      PyTuple_New(num_tensors)};
  PyObject* call = PyTuple_New(4);
  bool is_whole = call != nullptr;
  for (PyObject* part : parts) is_whole = is_whole && part != nullptr;
  if (is_whole) {
    Py_ssize_t next = 0;
    for (Py_ssize_t i = 0; i < num_words; i++)
      if (points[i] && given[i] != &_Py_NoneStruct) {
        Py_IncRef(given[i]);
        PyTuple_SetItem(parts[3], next++, given[i]);
      }
    for (Py_ssize_t i = 0; i < 4; i++) PyTuple_SetItem(call, i, parts[i]);
    is_whole = PyList_Append(tape->calls, call) == 0;
    Py_DecRef(call);
  }
  if (!is_whole) throw std::runtime_error("a kernel's call can't be recorded");  // Python has its own error
}

// A kernel as a Python function, and as one that reads words: both by the types of its parameters.
template <auto KERNEL>
struct Kernel;
template <typename... T, void (*KERNEL)(T...)>
struct Kernel<KERNEL> {
  static PyObject* call(const char* name, PyObject* const* given, Py_ssize_t count) {
    return guarded(count, sizeof...(T), [&] { run(name, given, std::index_sequence_for<T...>()); });
  }

 private:
  template <std::size_t... I>
  static void run(const char* name, PyObject* const* given, std::index_sequence<I...>) {
    if (tape->calls == nullptr || tape->thread != PyThread_get_thread_ident()) {
      KERNEL(argument<T>(given[I])...);
      return;
    }
    const uint64_t words[sizeof...(T) + 1] = {word_of(argument<T>(given[I]))...};
    static constexpr bool points[sizeof...(T) + 1] = {(std::is_pointer_v<T> || is_optional<T>)...};
    again<I...>(words);
    record(name, again<I...>, words, sizeof...(T), given, points);
  }

  template <std::size_t... I>
  static void again(const uint64_t* words) {
    KERNEL(from_word<T>(words[I])...);
  }
};

static PyObject* bind(PyObject*, PyObject* given) {
  void* addresses[2];
  for (Py_ssize_t i = 0; i < 2; i++) {
    PyObject* address = PyTuple_GetItem(given, i);
    addresses[i] = address == nullptr ? nullptr : PyLong_AsVoidPtr(address);
    if (PyErr_Occurred()) return nullptr;
  }
  tensor_data_pointer = reinterpret_cast<void* (*)(PyObject*)>(addresses[0]);
  tape = static_cast<Tape*>(addresses[1]);
  tape->replay = replay_calls;
  Py_RETURN_NONE;
}

}  // namespace onegraph
