#include "quantize.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels/kernels.h"

namespace edgemoe {
namespace {

/// Writes the planes of one rung of a tile; `shift` is the code's bit below the rung's lowest.
void pack_rung(const uint8_t* tile, int width, int shift, uint8_t* out) {
  for (int w = 8; w >= 1; w /= 2) {
    if (!(width & w)) continue;
    width -= w;
    const int per_vector = 8 / w, down = shift + width, mask = (1 << w) - 1;
    for (int v = 0; v < 16 / per_vector; ++v, out += 64) {
      std::memset(out, 0, 64);
      for (int i = 0; i < per_vector; ++i) {
        const uint8_t* step = tile + 64 * (v * per_vector + i);
        for (int b = 0; b < 64; ++b) out[b] = uint8_t(out[b] | (((step[b] >> down) & mask) << (w * i)));
      }
    }
  }
}

}  // namespace

bool quantize_nested(ThreadPool& pool, const float* w, int rows, int cols, const std::vector<uint8_t>& widths,
                     const float* level_weights, const std::vector<uint8_t*>& outs) {
  const Kernels& k = kernels();
  const int groups = blocks(cols, kTileCols);
  std::atomic<bool> finite{true};
  pool.run(blocks(rows, kTileRows), 1, [&](int begin, int end) {
    alignas(64) uint8_t tile[kTileRows * kTileCols], codes[kTileCols];
    uint16_t scales[2 * kTileRows];
    for (int block = begin; block < end; ++block) {
      for (int g = 0; g < groups; ++g) {
        std::memset(tile, 0, sizeof tile);
        std::memset(scales, 0, sizeof scales);
        const int n = cols - g * kTileCols < kTileCols ? cols - g * kTileCols : kTileCols;
        for (int lane = 0; lane < kTileRows && block * kTileRows + lane < rows; ++lane) {
          const float* group = w + size_t(block * kTileRows + lane) * cols + g * kTileCols;
          for (int c = 0; c < n; ++c) {
            // float16 scales: a group wider than its range could not be stored.
            if (!(std::fabs(group[c]) < 65504.0f)) finite.store(false, std::memory_order_relaxed);
          }
          k.quantize_group(group, n, level_weights, codes, &scales[lane], &scales[kTileRows + lane]);
          for (int c = 0; c < n; ++c) tile[c / 4 * 64 + lane * 4 + c % 4] = codes[c];
        }
        int shift = 8;
        for (size_t r = 0; r < widths.size(); ++r) {
          uint8_t* out = outs[r] + (size_t(block) * groups + g) * tile_bytes(widths[r], r == 0);
          if (r == 0) {
            std::memcpy(out, scales, kScaleBytes);
            out += kScaleBytes;
          }
          shift -= widths[r];
          pack_rung(tile, widths[r], shift, out);
        }
      }
    }
  });
  return finite.load();
}

}  // namespace edgemoe
