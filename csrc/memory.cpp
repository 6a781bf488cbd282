#include "memory.h"

#include <sys/mman.h>

#include <string>
#include <utility>

#include "error.h"

namespace edgemoe {

Memory::Memory(size_t bytes) : size_(round_up(bytes ? bytes : 1, kPage)) {
  void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    size_ = 0;
    throw OutOfBudget("memory: the system refused " + std::to_string(bytes) + " bytes of address space");
  }
  bytes_ = static_cast<uint8_t*>(p);
#ifdef MADV_NOHUGEPAGE
  // A huge page would take room that the budget does not know of.
  madvise(bytes_, size_, MADV_NOHUGEPAGE);
#endif
}

Memory::Memory(Memory&& other) noexcept
    : bytes_(std::exchange(other.bytes_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  std::swap(size_, other.size_);
  return *this;
}

Memory::~Memory() {
  if (bytes_) munmap(bytes_, size_);
}

void Memory::release(size_t begin, size_t length) {
  if (length) madvise(bytes_ + begin, length, MADV_DONTNEED);
}

void Memory::prefer_huge_pages() {
#ifdef MADV_HUGEPAGE
  madvise(bytes_, size_, MADV_HUGEPAGE);
#endif
}

}  // namespace edgemoe
