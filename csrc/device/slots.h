// Experts in a device's memory: the backing of a cache that fetches from the cache below it, in host memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backing.h"
#include "device/space.h"

namespace edgemoe {

class Cache;

/// Returns slots of `window` bytes each in a device's memory, whatever the level of the expert in them: device memory
/// cannot be given back by the page. An expert must be in `host` at the level to fetch when the fetch begins. It is
/// copied after the kernels that are queued by then, so that nothing that they read is overwritten. `host` must outlive
/// the backing.
std::unique_ptr<Backing> make_device_backing(std::shared_ptr<DeviceSpace> space, const Cache& host, size_t window);

/// Returns slots of `window` bytes each in host memory that a device's kernels read in place, for a device without its
/// own memory. `from` brings what is fetched, once the kernels that are queued by then have run; `ends` are those of
/// `ExpertShape`. No page is given back.
std::unique_ptr<Backing> make_shared_backing(std::shared_ptr<DeviceSpace> space, std::unique_ptr<Backing> from,
                                             std::vector<uint32_t> ends, size_t window);

}  // namespace edgemoe
