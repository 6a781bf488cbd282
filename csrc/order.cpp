#include "order.h"

#include <algorithm>

namespace edgemoe {
namespace {

constexpr size_t kMostBytes = size_t(256) << 10;  // per thread: a part of any core's own cache

int row_blocks(const NestedMatrix& w) { return blocks(w.rows, kTileRows); }

}  // namespace

Ahead ahead_of(const std::vector<const NestedMatrix*>& matrices, int block) {
  Ahead out;
  for (const NestedMatrix* w : matrices) {
    const int count = row_blocks(*w);
    if (block >= count) {
      block -= count;
      continue;
    }
    if (w->scheme != Scheme::kNested) return out;
    const int tiles = blocks(w->cols, kTileCols);
    size_t all = 0;
    for (int r = 0; r < w->num_rungs; ++r) {
      const size_t bytes = tile_bytes(w->widths[r], r == 0);
      out.from[r] = tiles_of(*w, r) + size_t(block) * tiles * bytes;
      out.step[r] = uint32_t(bytes);
      all += bytes;
    }
    out.steps = all ? int(std::min(size_t(count - block) * tiles, kMostBytes / all)) : 0;
    return out;
  }
  return out;
}

Ahead ahead_of(const float* matrix, int rows, int cols, int row) {
  constexpr uint32_t kStep = 512;
  Ahead out;
  out.from[0] = reinterpret_cast<const uint8_t*>(matrix + size_t(row) * cols);
  out.step[0] = kStep;
  out.steps = int(std::min(size_t(rows - row) * cols * sizeof(float), kMostBytes) / kStep);
  return out;
}

void ProductOrder::tell(const std::vector<const NestedMatrix*>& matrices, int grain) {
  int total = 0;
  for (const NestedMatrix* w : matrices) total += row_blocks(*w);
  for (int i = 0; i < pool_.size(); ++i) pool_.expect(i, ahead_of(matrices, pool_.first(total, grain, i)));
}

void ProductOrder::tell(const After& after) {
  for (size_t i = 0; i < after.ahead.size(); ++i) pool_.expect(int(i), after.ahead[i]);
}

}  // namespace edgemoe
