// Memory that we own: anonymous pages, page-aligned, returned to the system on demand.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __linux__
#error "edgemoe needs Linux: direct reads (O_DIRECT), madvise, sched_getaffinity and /proc are used throughout"
#endif

namespace edgemoe {

constexpr size_t kPage = 4096;  ///< unit of direct reads and of records

/// The unit, in bytes, in which the system gives and takes back memory: its page size, at least kPage.
size_t system_page();

inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

/// A range of zeroed address space that we own; a page takes memory only once it is touched. Move-only.
class Memory {
 public:
  Memory() = default;
  /// Throws OutOfBudget when the system refuses the range.
  explicit Memory(size_t bytes);
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  uint8_t* bytes() const { return bytes_; }
  size_t size() const { return size_; }

  /// Gives back the pages that lie wholly inside [begin, begin + length); they read as zeros afterwards.
  void release(size_t begin, size_t length);

  /// Makes the whole range resident, so that nobody has to track which pages have been touched.
  void touch();

  /// Asks for huge pages, or for none, which is the initial state. Only for a range that will be touched as a whole.
  void prefer_huge_pages(bool yes = true);

 private:
  uint8_t* bytes_ = nullptr;
  size_t size_ = 0;
};

}  // namespace edgemoe
