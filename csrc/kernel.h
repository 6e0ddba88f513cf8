// What every compiled kernel shares: plain pointers in, and one line to make it callable from Python.
//
// A kernel is a function of integers (addresses, sizes), floats and bools; it returns nothing, or an error message
// (nullptr for success). KERNEL(name) enters it in a table that module.cpp turns into Python functions. The table is
// data that the linker gathers: a constructor would run, in its file's instruction set, wherever the module is loaded.
// This header pulls in no library template on purpose: each file of csrc/cpu is compiled once per instruction set, and
// the linker would merge such templates into one copy, which might use instructions that the processor lacks.
#pragma once
#include <stdint.h>

union Argument {
  int64_t integer;
  double real;
};

struct Kernel {
  const char* group;      // "generic", "avx2", "avx512", "cuda" or "simt"
  const char* name;       // the name seen from Python
  const char* signature;  // one letter per argument: i = integer or address, f = float
  const char* (*call)(const Argument*);
};

// The table: pointers to kernels, in a section of the file that has its name.
#if defined(__APPLE__)
#define KERNEL_TABLE "__DATA,rlhf_fast"
#else
#define KERNEL_TABLE "rlhf_fast_kernels"
#endif

namespace {

template <class T>
struct Letter {
  static constexpr char value = 'i';
  static T get(const Argument& a) { return static_cast<T>(a.integer); }
};
template <>
struct Letter<float> {
  static constexpr char value = 'f';
  static float get(const Argument& a) { return static_cast<float>(a.real); }
};
template <>
struct Letter<double> {
  static constexpr char value = 'f';
  static double get(const Argument& a) { return a.real; }
};

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Indices<I...>;
};

template <class F, F f>
struct Bind;
template <class... A, void (*f)(A...)>
struct Bind<void (*)(A...), f> {
  static constexpr char signature[] = {Letter<A>::value..., 0};
  template <int... I>
  static void spread(const Argument* a, Indices<I...>) {
    f(Letter<A>::get(a[I])...);
  }
  static const char* call(const Argument* a) {
    spread(a, typename Count<sizeof...(A)>::type());
    return nullptr;
  }
};
template <class... A, const char* (*f)(A...)>
struct Bind<const char* (*)(A...), f> {
  static constexpr char signature[] = {Letter<A>::value..., 0};
  template <int... I>
  static const char* spread(const Argument* a, Indices<I...>) {
    return f(Letter<A>::get(a[I])...);
  }
  static const char* call(const Argument* a) { return spread(a, typename Count<sizeof...(A)>::type()); }
};

// An address as Python passes it, as a typed pointer. A null address (fake tensor, absent option) stays null.
template <class T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

#define KERNEL(function)                                                                       \
  static constexpr Kernel function##_entry = {KERNEL_GROUP, #function,                         \
                                              Bind<decltype(&function), &function>::signature, \
                                              &Bind<decltype(&function), &function>::call};    \
  __attribute__((section(KERNEL_TABLE), used)) static const Kernel* const function##_pointer = &function##_entry;
