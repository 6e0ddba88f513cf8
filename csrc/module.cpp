// Makes the table of kernels and constants (kernel.h) a Python module: `_cpu` with a submodule for each instruction
// set, `_cuda` with one, `cuda`, and for tests `_simt` with one, `simt`.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "kernel.h"

namespace py = pybind11;

// The ends of the table; the linker defines these symbols.
#if defined(__APPLE__)
extern const Entry* const first_entry[] __asm("section$start$__DATA$rlhf_fast");
extern const Entry* const last_entry[] __asm("section$end$__DATA$rlhf_fast");
#else
extern const Entry* const first_entry[] __asm("__start_rlhf_fast_kernels") __attribute__((visibility("hidden")));
extern const Entry* const last_entry[] __asm("__stop_rlhf_fast_kernels") __attribute__((visibility("hidden")));
#endif

namespace {

constexpr Py_ssize_t max_arguments = 64;

// With METH_FASTCALL a call takes a fraction of a microsecond, for any number of arguments.
PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* kernel = static_cast<const Entry*>(PyCapsule_GetPointer(self, nullptr));
  if (count != static_cast<Py_ssize_t>(std::strlen(kernel->signature)) || count > max_arguments)
    return PyErr_Format(PyExc_TypeError, "%s takes %zu arguments (%s), got %zd", kernel->name,
                        std::strlen(kernel->signature), kernel->signature, count);
  Argument slots[max_arguments];
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (kernel->signature[i] == 'f') {
      slots[i].real = PyFloat_AsDouble(args[i]);
    } else if (PyLong_Check(args[i])) {
      // Seeds and addresses may use all 64 bits; a negative number keeps its two's complement.
      slots[i].integer = static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(args[i]));
    } else {
      return PyErr_Format(PyExc_TypeError, "%s: argument %zd must be an int, got %s", kernel->name, i,
                          Py_TYPE(args[i])->tp_name);
    }
  }
  if (PyErr_Occurred()) return nullptr;
  const char* error;
  Py_BEGIN_ALLOW_THREADS error = kernel->call(slots);
  Py_END_ALLOW_THREADS if (error) return PyErr_Format(PyExc_RuntimeError, "%s: %s", kernel->name, error);
  Py_RETURN_NONE;
}

bool processor_supports(const char* group) {
#if defined(__x86_64__)
  const std::string name = group;
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#endif
  return std::strcmp(group, "avx2") != 0 && std::strcmp(group, "avx512") != 0;
}

py::object make_function(const Entry* kernel) {
  auto* method = new PyMethodDef{kernel->name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                                 METH_FASTCALL, kernel->signature};
  py::object self = py::reinterpret_steal<py::object>(PyCapsule_New(const_cast<Entry*>(kernel), nullptr, nullptr));
  return py::reinterpret_steal<py::object>(PyCFunction_New(method, self.ptr()));
}

}  // namespace

PYBIND11_MODULE(EXTENSION, m) {
  py::list groups;  // those that this machine can run, slowest first
  for (const char* group : {"generic", "avx2", "avx512", "cuda", "simt"}) {
    py::module_ part = py::reinterpret_borrow<py::module_>(m);
    bool is_empty = true;
    for (const Entry* const* pointer = first_entry; pointer != last_entry; ++pointer) {
      const Entry* entry = *pointer;
      if (std::strcmp(entry->group, group) != 0) continue;
      if (is_empty) part = m.def_submodule(group);
      is_empty = false;
      part.attr(entry->name) = entry->call ? make_function(entry) : py::int_(entry->value);
    }
    if (!is_empty && processor_supports(group)) groups.append(group);
  }
  m.attr("groups") = groups;
#if defined(_OPENMP)
  m.attr("has_openmp") = true;
#else
  m.attr("has_openmp") = false;
#endif
}
