// The Python module ddpm_fast._C: build information, and Philox for NumPy users. Needs no torch and
// compiles no kernel.
//
// It is written with the limited API of Python 3.11, so that one build works with that Python and
// every later one; pybind11 does not support it.
#undef Py_LIMITED_API  // torch's build helpers define that of an older Python, without buffers
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <memory>
#include <string>

#include "core/normal.h"
#include "core/philox.h"
#include "core/row.h"
#include "cpu/instruction_sets.h"

namespace {

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Ref = std::unique_ptr<PyObject, Release>;  // null after an error

uint32_t low(uint64_t value) {
  return static_cast<uint32_t>(value);
}
uint32_t high(uint64_t value) {
  return static_cast<uint32_t>(value >> 32);
}

// Reads an int in [0, last]; on an error sets an exception that names the argument.
bool read_int(PyObject* object, const char* name, uint64_t last, uint64_t* value) {
  const Ref number(PyNumber_Index(object));
  if (!number) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s must be an int; got %R", name, object);
    return false;
  }
  *value = PyLong_AsUnsignedLongLong(number.get());
  if (!PyErr_Occurred() && *value <= last) return true;
  PyErr_Clear();
  PyErr_Format(PyExc_ValueError, "%s must be in [0, %llu]; got %R", name,
               static_cast<unsigned long long>(last), number.get());
  return false;
}

bool read_words(PyObject* object, const char* name, Py_ssize_t count, uint32_t* words) {
  const Py_ssize_t size = PySequence_Check(object) ? PySequence_Size(object) : -1;
  if (size != count) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s must be %zd ints; got %R", name, count, object);
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Ref item(PySequence_GetItem(object, i));
    uint64_t value;
    if (!item || !read_int(item.get(), name, UINT32_MAX, &value)) return false;
    words[i] = low(value);
  }
  return true;
}

PyObject* philox4x32_10(PyObject*, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"counter", "key", nullptr};
  PyObject *counter, *key;
  uint32_t c[4], k[2];
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO", const_cast<char**>(names), &counter,
                                   &key) ||
      !read_words(counter, "counter", 4, c) || !read_words(key, "key", 2, k)) {
    return nullptr;
  }
  const ddpm::Philox4 w = ddpm::philox4x32_10(c[0], c[1], c[2], c[3], k[0], k[1]);
  return Py_BuildValue("[IIII]", w.r0, w.r1, w.r2, w.r3);
}

constexpr uint64_t kMostElements = uint64_t{4} << 32;  // the block counter has 32 bits

// Samples of a seed and a stream, and elements of each of them.
struct Request {
  uint64_t num, count, seed, stream, first_sample = 0;

  bool read(PyObject* args, PyObject* keywords, const char* count_name) {
    const char* names[] = {"num", count_name, "seed", "stream", "first_sample", nullptr};
    PyObject* given[5] = {};
    return PyArg_ParseTupleAndKeywords(args, keywords, "OOOO|O", const_cast<char**>(names),
                                       &given[0], &given[1], &given[2], &given[3], &given[4]) &&
           read_int(given[0], "num", INT64_MAX, &num) &&
           read_int(given[1], count_name, kMostElements, &count) &&
           read_int(given[2], "seed", UINT64_MAX, &seed) &&
           read_int(given[3], "stream", UINT32_MAX, &stream) &&
           (!given[4] || read_int(given[4], "first_sample", INT64_MAX, &first_sample));
  }
};

// Returns a NumPy array [num, count]; write(sample, block, out) writes four consecutive elements.
template <class T, class Write>
PyObject* filled(const Request& request, const char* dtype, Write write) {
  const Ref numpy(PyImport_ImportModule("numpy"));
  if (!numpy) return nullptr;
  Ref array(PyObject_CallMethod(numpy.get(), "empty", "(KK)s",
                                static_cast<unsigned long long>(request.num),
                                static_cast<unsigned long long>(request.count), dtype));
  Py_buffer buffer;
  if (!array || PyObject_GetBuffer(array.get(), &buffer, PyBUF_CONTIG) != 0) return nullptr;
  T* out = static_cast<T*>(buffer.buf);
  Py_BEGIN_ALLOW_THREADS;
  for (uint64_t k = 0; k < request.num; ++k) {
    for (uint64_t first = 0; first < request.count; first += 4) {
      T block[4];
      write(request.first_sample + k, static_cast<uint32_t>(first / 4), block);
      const uint64_t left = request.count - first;
      const size_t kept = left < 4 ? left : 4;
      std::memcpy(out, block, kept * sizeof(T));
      out += kept;
    }
  }
  Py_END_ALLOW_THREADS;
  PyBuffer_Release(&buffer);
  return array.release();
}

PyObject* philox_words(PyObject*, PyObject* args, PyObject* keywords) {
  Request r;
  if (!r.read(args, keywords, "words")) return nullptr;
  return filled<uint32_t>(r, "uint32", [&r](uint64_t sample, uint32_t block, uint32_t* out) {
    const ddpm::Philox4 w = ddpm::philox4x32_10(block, low(r.stream), low(sample), high(sample),
                                                low(r.seed), high(r.seed));
    out[0] = w.r0, out[1] = w.r1, out[2] = w.r2, out[3] = w.r3;
  });
}

PyObject* philox_normal(PyObject*, PyObject* args, PyObject* keywords) {
  Request r;
  if (!r.read(args, keywords, "elements")) return nullptr;
  return filled<float>(r, "float32", [&r](uint64_t sample, uint32_t block, float* out) {
    const ddpm::Normal4 n = ddpm::normal4(block, low(r.stream), sample, r.seed);
    std::memcpy(out, n.z, sizeof n.z);
  });
}

PyObject* row_fields(PyObject*, PyObject*) {
  static const char* names[] = {
#define DDPM_NAME(name) #name,
      DDPM_ROW_COLUMNS(DDPM_NAME)
#undef DDPM_NAME
  };
  Ref list(PyList_New(0));
  for (const char* name : names) {
    const Ref text(PyUnicode_FromString(name));
    if (!list || !text || PyList_Append(list.get(), text.get()) != 0) return nullptr;
  }
  return list.release();
}

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{ssssssssss}", "compiler", __VERSION__, "torch", DDPM_BUILT_WITH_TORCH,
                       "cuda", DDPM_BUILT_WITH_CUDA, "cuda_architectures", DDPM_CUDA_ARCHITECTURES,
                       "cpu_kernels", ddpm::runnable_instruction_sets().c_str());
}

template <class Function>
PyCFunction method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef kMethods[] = {
    {"build_info", method(build_info), METH_NOARGS,
     "build_info()\n--\n\n"
     "Versions that the extension was built with: compiler, torch, cuda (empty: CPU only), "
     "cuda_architectures; and the cpu_kernels that run on this processor."},
    {"row_fields", method(row_fields), METH_NOARGS,
     "row_fields()\n--\n\nThe columns of a step table's row, in order."},
    {"philox4x32_10", method(philox4x32_10), METH_VARARGS | METH_KEYWORDS,
     "philox4x32_10(counter, key)\n--\n\n"
     "Four uint32 of Philox4x32-10 (Salmon et al. 2011) for one counter and key."},
    {"philox_words", method(philox_words), METH_VARARGS | METH_KEYWORDS,
     "philox_words(num, words, seed, stream, first_sample=0)\n--\n\n"
     "uint32 [num, words]: the random words that philox_normal turns into normals, of the "
     "counters (0, 1, ..; stream; sample) with the seed as key. Runs on one thread."},
    {"philox_normal", method(philox_normal), METH_VARARGS | METH_KEYWORDS,
     "philox_normal(num, elements, seed, stream, first_sample=0)\n--\n\n"
     "float32 [num, elements]: standard normals of the samples from first_sample on, of a seed and "
     "a stream, elements in channels-last order. Runs on one thread."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot kSlots[] = {{0, nullptr}};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Build information of ddpm_fast, and its random numbers without torch.",
    0,
    kMethods,
    kSlots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModuleDef_Init(&kModule);
}
