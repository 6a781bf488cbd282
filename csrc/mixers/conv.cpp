#include "mixers/conv.h"

#include <algorithm>

namespace edgemoe {

void short_conv(Workspace& ws, const ConvShape& shape, const float* x, const float* weight, const float* bias,
                const float* before, float* tail, int T, float* out) {
  const Kernels& kn = kernels();
  constexpr int kChannels = 256;  // per piece of work
  ws.pool.run(blocks(shape.channels, kChannels), 1, [&](int begin, int end) {
    kn.short_conv(shape, x, weight, bias, before, tail, T, begin * kChannels, std::min(end * kChannels, shape.channels),
                  out);
  });
}

}  // namespace edgemoe
