// Huge pages for the large tensors of a linear head. A first visit of 4 KiB costs about a microsecond, of 100 MiB a
// tenth of the products of a training step.
#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernel.h"

namespace {

// Has no effect where the system does not have them, and on the parts of pages at both ends.
void advise_huge_pages(uintptr_t begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t first = (begin + page - 1) / page * page, end = (begin + bytes) / page * page;
  if (first < end) (void)madvise(ptr<void>(first), end - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

KERNEL(advise_huge_pages)

}  // namespace
