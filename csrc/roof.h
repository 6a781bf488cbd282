// The roofline of the machine: the best rates of memory and disk, to which benchmarks compare each figure.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "file.h"

namespace edgemoe {

/// Bytes per second that `threads` threads read together from `bytes` of memory, the best of five passes.
double memory_rate(size_t bytes, int threads);

/// Bytes per second that `threads` threads read together from `pieces` of existing memory, {first byte, bytes} in whole
/// pages, the best of five passes; 0 when there are none.
double read_rate(const std::vector<std::pair<const uint8_t*, size_t>>& pieces, int threads);

/// Bytes per second of reads of `length` at `offsets`, `num_readers` at a time, checksums left out.
double disk_rate(const std::shared_ptr<const File>& file, const std::vector<uint64_t>& offsets, size_t length,
                 int num_readers);

}  // namespace edgemoe
