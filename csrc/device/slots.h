// Experts in a device's memory: the bytes behind a cache whose fetches come from the cache below, in the host's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backing.h"
#include "device/space.h"

namespace edgemoe {

class Cache;

/// Slots of `window` bytes each in a device's memory, whatever the level of what lies there: device memory cannot be
/// given back by the page. What is fetched must be in `host` at that level when the fetch begins, and is copied behind
/// the kernels that are queued by then, so that nothing that they read is written over. `host` must outlive it.
std::unique_ptr<Backing> make_device_backing(std::shared_ptr<DeviceSpace> space, const Cache& host, size_t window);

/// Slots of `window` bytes each of the host's memory that the kernels of a device read where they lie, for one that has
/// no memory of its own. `from` brings what is fetched, once the kernels that are queued by then have run; `ends` are
/// those of `ExpertShape`. No page is given back.
std::unique_ptr<Backing> make_shared_backing(std::shared_ptr<DeviceSpace> space, std::unique_ptr<Backing> from,
                                             std::vector<uint32_t> ends, size_t window);

}  // namespace edgemoe
