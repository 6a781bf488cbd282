#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "error.h"
#include "memory.h"

namespace edgemoe {

File::File(std::string path) : path_(std::move(path)) {
  buffered_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not block us
  if (buffered_ < 0) throw ReadError(path_ + ": " + std::strerror(errno));
  struct stat s;
  if (fstat(buffered_, &s) != 0 || !S_ISREG(s.st_mode)) {
    close(buffered_);
    throw ReadError(path_ + ": not a regular file");
  }
  size_ = uint64_t(s.st_size);
  // Weights that we keep ourselves must not take room in the page cache as well.
  posix_fadvise(buffered_, 0, 0, POSIX_FADV_RANDOM);
  direct_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_DIRECT);
  if (direct_ >= 0) {
    // Some file systems accept O_DIRECT and refuse the read; and the path may name another file by now.
    Memory probe(kPage);
    struct stat t;
    if (fstat(direct_, &t) != 0 || t.st_dev != s.st_dev || t.st_ino != s.st_ino || size_ < kPage ||
        pread(direct_, probe.bytes(), kPage, 0) != ssize_t(kPage)) {
      close(direct_);
      direct_ = -1;
    }
  }
}

File::~File() {
  if (direct_ >= 0) close(direct_);
  if (buffered_ >= 0) close(buffered_);
}

void File::read_pages(uint64_t offset, size_t length, uint8_t* to) const {
  const size_t wanted = offset >= size_ ? 0 : size_ - offset < length ? size_t(size_ - offset) : length;
  size_t done = 0;
  bool is_direct = direct_ >= 0;
  while (done < wanted) {
    // A direct read must start on a page: the rest of a short read, and one that is refused, go through the page cache.
    is_direct = is_direct && done % kPage == 0;
    const ssize_t n = is_direct ? pread(direct_, to + done, length - done, off_t(offset + done))
                                : pread(buffered_, to + done, wanted - done, off_t(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EINVAL && is_direct) {
      is_direct = false;
      continue;
    }
    if (n < 0) {
      throw ReadError(path_ + ": read of " + std::to_string(length) + " bytes at offset " + std::to_string(offset) +
                      " failed: " + std::strerror(errno));
    }
    if (n == 0) break;
    done += size_t(n);
  }
  if (done < wanted || wanted == 0) {
    throw ReadError(path_ + ": the file ends at offset " + std::to_string(offset + done) + "; expected " +
                    std::to_string(length) + " bytes at offset " + std::to_string(offset) +
                    " (was it replaced or truncated?)");
  }
  if (!is_direct) posix_fadvise(buffered_, off_t(offset), off_t(length), POSIX_FADV_DONTNEED);
}

}  // namespace edgemoe
