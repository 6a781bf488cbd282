// One open .moe file: positioned reads that bypass the page cache where the file system allows it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace edgemoe {

/// One file, opened for reading; owns its descriptors. Thread-safe.
class File {
 public:
  /// Throws ReadError when the file cannot be opened.
  explicit File(std::string path);
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  virtual ~File();

  /// Reads exactly `length` bytes at `offset`. All three arguments must be multiples of kPage. The last page of the
  /// file may be short; the rest of that page in `to` is left as it is. Throws ReadError with path and offset. Virtual
  /// so that a test can hold reads back.
  virtual void read_pages(uint64_t offset, size_t length, uint8_t* to) const;

  /// The buffered descriptor; it remains owned by this object.
  int fileno() const { return buffered_; }
  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  /// Whether reads bypass the page cache.
  bool is_direct() const { return direct_ >= 0; }

 private:
  std::string path_;
  uint64_t size_ = 0;
  int buffered_ = -1;
  int direct_ = -1;
};

}  // namespace edgemoe
