// The check of the core's own tests, which prints what failed and counts it.
#pragma once

#include <cstdio>

namespace edgemoe {

inline int failures = 0;

/// Whether `body` throws an E.
template <class E, class Body>
bool throws(const Body& body) {
  try {
    body();
  } catch (const E&) {
    return true;
  }
  return false;
}

}  // namespace edgemoe

#define CHECK(ok)                                                   \
  do {                                                              \
    if (!(ok)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #ok); \
      ++edgemoe::failures;                                          \
    }                                                               \
  } while (0)
