#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "error.h"

namespace edgemoe {

size_t system_page() {
  static const size_t page = size_t(sysconf(_SC_PAGESIZE)) > kPage ? size_t(sysconf(_SC_PAGESIZE)) : kPage;
  return page;
}

Memory::Memory(size_t bytes) : size_(round_up(bytes ? bytes : 1, system_page())) {
  void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    size_ = 0;
    throw OutOfBudget("memory: the system refused " + std::to_string(bytes) +
                      " bytes of address space; is `ulimit -v` too small?");
  }
  bytes_ = static_cast<uint8_t*>(p);
  // A child has no use for weights, and copy-on-write would double them.
  madvise(bytes_, size_, MADV_DONTFORK);
  prefer_huge_pages(false);  // a huge page would take memory that the budget does not count
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
  const size_t page = system_page(), first = round_up(begin, page), end = (begin + length) / page * page;
  if (end > first && madvise(bytes_ + first, end - first, MADV_DONTNEED) != 0) {
    throw std::logic_error("memory: madvise failed");
  }
}

void Memory::touch() {
  for (size_t at = 0; at < size_; at += system_page()) *static_cast<volatile uint8_t*>(bytes_ + at) = 0;
}

void Memory::prefer_huge_pages(bool yes) { madvise(bytes_, size_, yes ? MADV_HUGEPAGE : MADV_NOHUGEPAGE); }

}  // namespace edgemoe
