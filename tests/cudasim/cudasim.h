// The simulator's own interface: what tests set and read, and what its files share.
//
// * Every thread of a block is a fiber that switches only where threads synchronise; the order in which fibers and
//   blocks run is drawn from a seed.
// * Streams are queues that nothing drains until a call waits. Then the heads that may run do so in an order drawn from
//   the seed, or one stream is starved; so a missing wait shows as a wrong result.
// * The host cannot touch device memory outside device work. It is poisoned with bytes of ones, which as floats are
//   NaN, and each allocation ends in canaries.
#pragma once

#include <cstdint>
#include <string>

#include "cuda_runtime.h"

namespace cudasim {

struct Config {
  uint64_t seed = 0;  ///< 0 for the order of submission
  int starved = -1;   ///< the stream, counted from 0, that runs only when no other can
  size_t total_bytes = size_t(1) << 30;
  int num_devices = 1;
  int driver = 13000;  ///< version
  int integrated = 0;
  size_t others_bytes = 0;  ///< of device memory that other programs hold
  bool may_copy = true;     ///< else copies fail
  bool may_lend = true;     ///< else existing host memory cannot be pinned
  int may_make = -1;        ///< how many streams, events and pinned buffers until one fails; -1 for any number
};
struct Stats {
  uint64_t kernels, blocks, threads, graphs;
  uint64_t copies, copied_bytes, pageable_copies;
  uint64_t device_bytes, pinned_bytes, peak_device_bytes;
};
Config& config();
Stats& stats();

/// What the last error was about.
std::string& report();
uint32_t draw();

/// Runs a grid. Returns false when a thread broke a rule, which `report` names.
bool run_grid(dim3 grid, dim3 block, const std::function<void()>& body);

/// A scope in which device memory can be accessed.
class DeviceWork {
 public:
  DeviceWork();
  ~DeviceWork();
};

}  // namespace cudasim
