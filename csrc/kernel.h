// Compiled kernels and constants become attributes of a Python module.
//
// A kernel is a function of integers (addresses, sizes), floats and bools. It returns nothing, or an error message
// (nullptr for success). KERNEL(name) and CONSTANT(name, value) each put an entry into a table, from which module.cpp
// makes Python functions and numbers. A constant is for what the Python caller must know too, as a layout.
//
// The table is a linker section, not filled by constructors: a constructor compiled for AVX-512 would crash at import
// on a machine without it.
//
// This header uses no library template on purpose. Each file of csrc/cpu is compiled once per instruction set. The
// linker would merge the copies of such a template into one, which might use instructions that the processor lacks.
#pragma once
#include <stdint.h>

union Argument {
  int64_t integer;
  double real;
};

struct Entry {
  const char* group;                     // "generic", "avx2", "avx512", "cuda" or "simt"
  const char* name;                      // the name in Python
  const char* signature;                 // of a kernel, one letter per argument: i = integer or address, f = float
  const char* (*call)(const Argument*);  // null for a constant
  int64_t value;                         // of a constant
};

// The table's section: pointers to entries.
#if defined(__APPLE__)
#define ENTRY_TABLE "__DATA,rlhf_fast"
#else
#define ENTRY_TABLE "rlhf_fast_kernels"
#endif

namespace {

template <class T>
struct ArgumentType {
  static constexpr char letter = 'i';
  static T get(const Argument& a) { return static_cast<T>(a.integer); }
};
template <>
struct ArgumentType<float> {
  static constexpr char letter = 'f';
  static float get(const Argument& a) { return static_cast<float>(a.real); }
};
template <>
struct ArgumentType<double> {
  static constexpr char letter = 'f';
  static double get(const Argument& a) { return a.real; }
};

// Count<N>::type is Indices<0, 1, ..., N - 1>.
template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Indices<I...>;
};

// Bind<F, f>::call takes an array of arguments and calls f.
template <class F, F f>
struct Bind;
template <class... A, void (*f)(A...)>
struct Bind<void (*)(A...), f> {
  static constexpr char signature[] = {ArgumentType<A>::letter..., 0};
  template <int... I>
  static void apply(const Argument* a, Indices<I...>) {
    f(ArgumentType<A>::get(a[I])...);
  }
  static const char* call(const Argument* a) {
    apply(a, typename Count<sizeof...(A)>::type());
    return nullptr;
  }
};
template <class... A, const char* (*f)(A...)>
struct Bind<const char* (*)(A...), f> {
  static constexpr char signature[] = {ArgumentType<A>::letter..., 0};
  template <int... I>
  static const char* apply(const Argument* a, Indices<I...>) {
    return f(ArgumentType<A>::get(a[I])...);
  }
  static const char* call(const Argument* a) { return apply(a, typename Count<sizeof...(A)>::type()); }
};

// An address from Python as a typed pointer. A null address (fake tensor, absent option) stays null.
template <class T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

#define ENTRY(name, ...)                                                    \
  static constexpr Entry name##_entry = {KERNEL_GROUP, #name, __VA_ARGS__}; \
  __attribute__((section(ENTRY_TABLE), used)) static const Entry* const name##_pointer = &name##_entry;

#define KERNEL(function) \
  ENTRY(function, Bind<decltype(&function), &function>::signature, &Bind<decltype(&function), &function>::call, 0)

#define CONSTANT(name, value) ENTRY(name, nullptr, nullptr, value)
