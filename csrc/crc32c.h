// CRC-32C (Castagnoli), the checksum of every section and rung.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgemoe {

/// Returns the CRC-32C of `bytes`, continuing from `crc` (0 at the start). Thread-safe.
uint32_t crc32c(const uint8_t* bytes, size_t length, uint32_t crc = 0);

}  // namespace edgemoe
