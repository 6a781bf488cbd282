#include "stored_rows.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "crc32c.h"
#include "error.h"

namespace edgemoe {
namespace {

constexpr size_t kRuns = 8;                 // reads of each rung that are in flight together
constexpr int kBlocks = 16;                 // blocks in all of these, including unwanted ones in between
constexpr int kNear = 5;                    // blocks at most this far apart share a read: cheaper than a second one
constexpr int kReaders = 4;                 // as many as read experts
constexpr size_t kRecent = 256;             // texts repeat their tokens: 60 to 75% are among the last 256
constexpr size_t kPiece = size_t(1) << 20;  // bytes at a time when a rung is read through
constexpr size_t kAlign = 64;               // bytes, of tiles

/// The form of a rung with nothing but its tiles.
RungForm bare(const NestedMatrix& m, int rung) {
  RungForm form = form_of(m, rung);
  form.has_row_scales = false;
  form.rank = form.basis_rank = 0;
  return form;
}

/// Bytes before the tiles of a rung.
size_t before_tiles(const NestedMatrix& m, int rung) {
  return m.scheme == Scheme::kNested && form_of(m, rung).has_row_scales ? row_scale_bytes(m.rows) : 0;
}

}  // namespace

/// Where all that is kept lies in memory, and the form of the block that is decoded.
struct StoredRows::Layout {
  NestedMatrix matrix, block;
  int resident;     ///< number of resident rungs
  int scaled = -1;  ///< the rung whose row scales apply, if it is not resident; else -1
  size_t slot = 0;  ///< bytes of a rung's reads
  size_t assembled, scales = 0, correction = 0, basis = 0, sums, recent;  ///< where they start in memory, after reads
  size_t total;

  Layout(int rows, int cols, const std::vector<uint8_t>& widths, int num_resident, const Coding& coding)
      : matrix(hollow_matrix(rows, cols, widths, coding)), block(matrix), resident(num_resident) {
    expect_within("resident rungs", resident, 0, matrix.num_rungs - 1);
    const int last = matrix.num_rungs - 1, rank = matrix.ranks[last];
    block.rows = kTileRows;
    block.row_scales = 1;
    block.basis_rank = 0;
    std::fill_n(block.ranks, last, uint8_t(0));
    size_t at = 0;
    const auto take = [&at](size_t bytes) { return std::exchange(at, at + round_up(bytes, kAlign)); };
    // A run takes at most two pages more than its blocks, as it may begin and end within a page.
    const size_t most = std::min(size_t(kBlocks), num_blocks()), runs = std::min(kRuns, num_blocks());
    for (int r = resident; r <= last; ++r) slot = std::max(slot, round_up(most * stride(r), kPage) + 2 * runs * kPage);
    take((matrix.num_rungs - resident) * slot);
    assembled = take(block_bytes());
    if (matrix.scheme == Scheme::kNested) {
      int r = last;
      while (r > 0 && !form_of(matrix, r).has_row_scales) --r;
      if (r >= resident) scaled = r;
    }
    scales = take(scaled < 0 ? 0 : row_scale_bytes(rows));
    correction = take(correction_bytes(rows, rank));
    basis = take(resident ? 0 : rank * basis_stride(cols));
    sums = take(sizeof(uint32_t) * num_blocks() * (matrix.num_rungs - resident));
    recent = take(sizeof(float) * kRecent * cols);
    total = at;
  }

  size_t num_blocks() const { return size_t(blocks(matrix.rows, kTileRows)); }
  /// Bytes of a block's tiles in a rung.
  size_t stride(int rung) const { return rung_bytes(matrix.scheme, kTileRows, matrix.cols, bare(matrix, rung)); }
  size_t block_bytes() const {
    size_t bytes = 0;
    for (int r = 0; r < block.num_rungs; ++r)
      bytes += rung_bytes(block.scheme, kTileRows, block.cols, form_of(block, r));
    return bytes;
  }
};

size_t StoredRows::bytes_for(int rows, int cols, const std::vector<uint8_t>& widths, int resident,
                             const Coding& coding) {
  return round_up(Layout(rows, cols, widths, resident, coding).total, system_page());
}

StoredRows::StoredRows(std::shared_ptr<const File> file, const StoredRungs& stored, int rows, int cols,
                       const std::vector<uint8_t>& widths, const Nested* resident, bool verify, std::string name,
                       const Coding& coding)
    : file_(std::move(file)), name_(std::move(name)), rows_(rows), verify_(verify), recent_ids_(kRecent, -1) {
  const Layout at(rows, cols, widths, resident ? resident->matrix.num_rungs : 0, coding);
  const NestedMatrix& m = at.matrix;
  check_stored(m, stored);
  if (resident) {
    const NestedMatrix& first = resident->matrix;
    if (first.scheme != m.scheme || first.rows != rows || first.cols != cols || first.row_scales != m.row_scales ||
        first.basis_rank != m.basis_rank || !std::equal(first.widths, first.widths + first.num_rungs, m.widths)) {
      throw std::invalid_argument("stored rows: the resident rungs are of another matrix");
    }
    arena_ = resident->arena;
  }
  memory_ = Memory(at.total);
  memory_.touch();  // a budget counts all of it from now on
  uint8_t* const base = memory_.bytes();
  slots_ = base;
  slot_ = at.slot;
  assembled_ = base + at.assembled;
  assembled_bytes_ = at.block_bytes();
  recent_ = reinterpret_cast<float*>(base + at.recent);
  num_missing_ = size_t(m.num_rungs - at.resident);
  const int last = m.num_rungs - 1, rank = m.ranks[last];

  block_ = at.block;
  uint8_t* to = assembled_;
  uint64_t offset = stored.offset;
  for (int r = 0; r < m.num_rungs; ++r) {
    block_.rungs[r] = to;
    Part part{at.stride(r), size_t(to - assembled_) + before_tiles(block_, r), nullptr, offset + before_tiles(m, r),
              nullptr};
    if (r < at.resident) part.resident = resident->matrix.rungs[r] + before_tiles(m, r);
    if (r >= at.resident) {
      part.sums = reinterpret_cast<uint32_t*>(base + at.sums) + size_t(r - at.resident) * at.num_blocks();
    }
    parts_.push_back(part);
    to += rung_bytes(block_.scheme, kTileRows, cols, form_of(block_, r));
    offset += stored.lengths[size_t(r)];
  }
  if (m.scheme == Scheme::kNested) scales_ = at.scaled < 0 ? row_scales_of(resident->matrix) : base + at.scales;
  if (rank) {
    correction_ = base + at.correction;
    block_.basis = resident ? resident->matrix.basis : reinterpret_cast<const int8_t*>(base + at.basis);
  }
  for (int r = at.resident; r < m.num_rungs; ++r) {
    std::vector<Kept> kept;
    const size_t tiles = before_tiles(m, r), after = tiles + at.num_blocks() * at.stride(r);
    if (r == at.scaled) kept.push_back({0, tiles, base + at.scales});
    if (r == 0 && rank) {
      kept.push_back(
          {stored.lengths[0] - m.basis_rank * basis_stride(cols), rank * basis_stride(cols), base + at.basis});
    }
    if (r == last && rank) kept.push_back({after, correction_bytes(rows, rank), base + at.correction});
    go_through(stored, size_t(r), at, kept);
  }
}

void StoredRows::go_through(const StoredRungs& stored, size_t rung, const Layout& at, const std::vector<Kept>& kept) {
  const uint64_t start = std::accumulate(stored.lengths.begin(), stored.lengths.begin() + long(rung), stored.offset);
  const Part& part = parts_[rung];
  const size_t length = stored.lengths[rung], tiles = size_t(part.offset - start);
  const size_t end_of_tiles = tiles + at.num_blocks() * part.stride;
  const Memory buffer(kPiece);
  uint32_t crc = 0;
  // Reads bytes [begin, end) of the rung in pieces that begin and end on pages of the file, but for the first and last.
  const auto pass = [&](size_t begin, size_t end) {
    while (begin < end) {
      const uint64_t from = (start + begin) / kPage * kPage;
      const size_t skipped = size_t(start + begin - from);
      const size_t n = std::min(kPiece - skipped, end - begin);
      file_->read_pages(from, round_up(skipped + n, kPage), buffer.bytes());
      const uint8_t* p = buffer.bytes() + skipped;
      if (verify_) crc = crc32c(p, n, crc);
      for (size_t i = std::max(begin, tiles); verify_ && i < std::min(begin + n, end_of_tiles);) {
        const size_t block = (i - tiles) / part.stride;
        const size_t stop = std::min({begin + n, end_of_tiles, tiles + (block + 1) * part.stride});
        part.sums[block] = crc32c(p + (i - begin), stop - i, part.sums[block]);
        i = stop;
      }
      for (const Kept& k : kept) {
        const size_t a = std::max(begin, k.begin), b = std::min(begin + n, k.begin + k.length);
        if (a < b) std::memcpy(k.to + (a - k.begin), p + (a - begin), b - a);
      }
      begin += n;
    }
  };
  if (!verify_) {
    for (const Kept& k : kept) pass(k.begin, k.begin + k.length);
    return;
  }
  pass(0, length);
  check_rung(*file_, name_, int(rung), crc, stored.crcs[rung]);
}

void StoredRows::decode(const int32_t* ids, size_t n, float scale, float* out) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t cols = size_t(block_.cols);
  std::vector<size_t> missing;
  for (size_t i = 0; i < n; ++i) {
    if (const float* row = find_recent(ids[i])) {
      std::copy_n(row, cols, out + i * cols);
    } else {
      missing.push_back(i);
    }
  }
  std::sort(missing.begin(), missing.end(),
            [ids](size_t a, size_t b) { return std::make_pair(ids[a], a) < std::make_pair(ids[b], b); });
  for (size_t i = 0; i < missing.size();) {
    std::vector<Run> runs;
    size_t stop = i;
    for (int room = kBlocks; stop < missing.size(); ++stop) {
      const int block = ids[missing[stop]] / kTileRows;
      const bool is_near = !runs.empty() && block - runs.back().last <= kNear;
      const int more = is_near ? block - runs.back().last : 1;
      if (more > room || (!is_near && runs.size() == kRuns)) break;
      room -= more;
      if (is_near) {
        runs.back().last = block;
      } else {
        runs.push_back({block, block});
      }
    }
    read(runs);
    const float* row = nullptr;
    int assembled = -1;
    size_t run = 0;
    for (int32_t before = -1; i < stop; ++i) {
      const int32_t id = ids[missing[i]];
      const int block = id / kTileRows;
      while (block > runs[run].last) ++run;
      if (block != assembled) assemble(block, run);
      assembled = block;
      if (id != before) row = decode_one(id);
      before = id;
      std::copy_n(row, cols, out + missing[i] * cols);
    }
  }
  for (size_t i = 0; scale != 1.0f && i < n * cols; ++i) out[i] *= scale;
}

/// Reads the missing rungs of at most kBlocks blocks, in at most kRuns runs, into `slots_`.
void StoredRows::read(const std::vector<Run>& runs) {
  jobs_.clear();
  jobs_.resize(runs.size() * num_missing_);
  const size_t first = parts_.size() - num_missing_;
  for (size_t k = 0; k < num_missing_; ++k) {
    const Part& part = parts_[first + k];
    uint8_t* to = slots_ + k * slot_;
    for (size_t i = 0; i < runs.size(); ++i) {
      ReadJob& job = jobs_[i * num_missing_ + k];
      const uint64_t begin = part.offset + uint64_t(runs[i].first) * part.stride;
      const uint64_t end = part.offset + uint64_t(runs[i].last + 1) * part.stride;
      job.offset = begin / kPage * kPage;
      job.length = size_t(round_up(end, kPage) - job.offset);
      job.to = std::exchange(to, to + job.length);
    }
  }
  try {
    if (jobs_.size() > 1 && !loader_) loader_ = std::make_unique<Loader>(file_, kReaders);
  } catch (const OutOfBudget&) {  // no thread can be started: then one read after the other
  }
  const size_t own = loader_ ? 1 : jobs_.size();  // jobs that this thread reads itself
  std::vector<ReadJob*> done;
  done.reserve(jobs_.size());
  try {
    for (size_t i = own; i < jobs_.size(); ++i) loader_->submit(&jobs_[i]);
  } catch (...) {
    loader_.reset();  // waits for what has begun
    throw;
  }
  for (size_t i = 0; i < own; ++i) {  // sooner than another thread would wake up
    try {
      file_->read_pages(jobs_[i].offset, jobs_[i].length, jobs_[i].to);
    } catch (...) {
      jobs_[i].error = std::current_exception();
    }
  }
  while (done.size() + own < jobs_.size()) loader_->collect(true, &done);
  for (size_t i = 0; i < jobs_.size(); ++i) {
    if (!jobs_[i].error) continue;
    try {
      std::rethrow_exception(jobs_[i].error);
    } catch (const ReadError& e) {
      throw ReadError(std::string(e.what()) + ": rows " + std::to_string(runs[i / num_missing_].first * kTileRows) +
                      " and further of tensor " + name_);
    }
  }
}

/// Assembles a block from all its rungs; `run` is the number of the run that it was read in.
void StoredRows::assemble(int block, size_t run) {
  const size_t first = parts_.size() - num_missing_;
  for (size_t r = 0; r < parts_.size(); ++r) {
    const Part& part = parts_[r];
    const uint8_t* from;
    if (part.resident) {
      from = part.resident + size_t(block) * part.stride;
    } else {
      const uint64_t offset = part.offset + uint64_t(block) * part.stride;
      const ReadJob& job = jobs_[run * num_missing_ + r - first];
      from = job.to + (offset - job.offset);
      const uint32_t crc = verify_ ? crc32c(from, part.stride) : 0;
      if (verify_ && crc != part.sums[block]) {
        char text[160];
        std::snprintf(text, sizeof text, ", rung %d, rows %d to %d at offset %llu, is %08x; it was %08x", int(r),
                      block * kTileRows, std::min((block + 1) * kTileRows, rows_) - 1,
                      static_cast<unsigned long long>(offset), crc, part.sums[block]);
        throw FormatError(file_->path() + ": checksum of tensor " + name_ + text + " (was the file replaced?)");
      }
    }
    std::memcpy(assembled_ + part.to, from, part.stride);
  }
  if (scales_) {
    std::memcpy(assembled_, scales_ + size_t(block) * kTileRows * sizeof(uint16_t), kTileRows * sizeof(uint16_t));
  }
  if (const int rank = rank_of(block_)) {
    const size_t u = kMaxRank * sizeof(uint16_t), codes = size_t(kTileRows) * size_t(rank) / 2;
    uint8_t* const to = assembled_ + assembled_bytes_ - (u + codes);
    std::memcpy(to, correction_, u);
    std::memcpy(to + u, correction_ + u + size_t(block) * codes, codes);
  }
}

const float* StoredRows::find_recent(int32_t id) const {
  const auto at = std::find(recent_ids_.begin(), recent_ids_.end(), id);
  return at == recent_ids_.end() ? nullptr : recent_ + size_t(at - recent_ids_.begin()) * size_t(block_.cols);
}

/// Decodes a row of the assembled block into `recent_`.
const float* StoredRows::decode_one(int32_t id) {
  const size_t at = std::exchange(next_recent_, (next_recent_ + 1) % kRecent);
  float* const row = recent_ + at * size_t(block_.cols);
  decode_row(kernels(), block_, id % kTileRows, row);
  recent_ids_[at] = id;
  return row;
}

}  // namespace edgemoe
