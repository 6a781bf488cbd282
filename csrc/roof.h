// What the machine can do at best; benchmarks put it beside each figure.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "file.h"

namespace edgemoe {

/// Bytes per second that `threads` threads read together from `bytes` of memory, the best of five passes.
double memory_rate(size_t bytes, int threads);

/// Bytes per second that `threads` threads read together of memory that is there already, the best of five passes; 0
/// when there is none. Pieces are whole pages.
double read_rate(const std::vector<std::pair<const uint8_t*, size_t>>& pieces, int threads);

/// Bytes per second of reads of `length` at `offsets`, `num_readers` at a time, checksums left out.
double disk_rate(const std::shared_ptr<const File>& file, const std::vector<uint64_t>& offsets, size_t length,
                 int num_readers);

}  // namespace edgemoe
