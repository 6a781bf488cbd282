// The errors that the core throws; bindings/ maps them to Python. A caller's mistake is std::invalid_argument.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace edgemoe {

/// The error of a file that is not what it claims to be.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The error of a memory budget that is too small for what was asked.
struct OutOfBudget : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The error of a read of weights: the disk failed, or the file ended. The message gives the path and the offset.
struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The error of a computed value that does not fit the type in which it must be stored.
struct RangeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The error of a device that failed or is not available. The message names the call that failed.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Throws std::invalid_argument unless low <= value <= high.
inline void expect_within(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(low) + " to " + std::to_string(high) +
                              ", got " + std::to_string(value));
}

constexpr int64_t kMaxSize = int64_t(1) << 24;  ///< largest dimension of a model; keeps products inside 64 bits

}  // namespace edgemoe
