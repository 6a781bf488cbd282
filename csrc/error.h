// The errors that the core throws; bindings/ maps them to Python. A caller's mistake is std::invalid_argument.
#pragma once

#include <stdexcept>
#include <string>

namespace edgemoe {

/// A file is not what it claims to be.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The memory budget is too small for what was asked.
struct OutOfBudget : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The disk failed, or the file ended, while weights were read. The message has path and offset.
struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace edgemoe
