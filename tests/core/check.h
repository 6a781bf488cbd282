// What the core's own tests say when something is wrong.
#pragma once

#include <cstdio>

namespace edgemoe {

inline int failures = 0;

}  // namespace edgemoe

#define CHECK(ok)                                                   \
  do {                                                              \
    if (!(ok)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #ok); \
      ++edgemoe::failures;                                          \
    }                                                               \
  } while (0)
