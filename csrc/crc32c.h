// CRC-32C (Castagnoli), the checksum of every section and rung.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgemoe {

/// Returns the CRC-32C of `bytes`, continuing from `crc` (0 at the start), by the CPU's instruction where it has one.
/// Thread-safe.
uint32_t crc32c(const uint8_t* bytes, size_t length, uint32_t crc = 0);

/// The same by lookup tables, for CPUs without the instruction.
uint32_t crc32c_by_table(const uint8_t* bytes, size_t length, uint32_t crc = 0);

/// Whether this CPU has the instruction.
bool crc32c_has_instruction();

constexpr size_t kCrcPart = 4096;  ///< bytes in each of the three parts that are computed side by side

/// The inner loop, in crc32c_instruction.cpp. `crc` and the result are the raw register, without the inversions before
/// and after. `zeros` [4, 256] has, for each position and value of a byte of a CRC, what it becomes after kCrcPart zero
/// bytes of input.
uint32_t update_by_instruction(const uint8_t* bytes, size_t length, uint32_t crc, const uint32_t* zeros);

}  // namespace edgemoe
