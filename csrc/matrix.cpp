#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "crc32c.h"
#include "error.h"

namespace edgemoe {
namespace {

size_t rung_bytes(const NestedMatrix& m, int rung) { return rung_bytes(m.scheme, m.rows, m.cols, form_of(m, rung)); }

/// Points the matrix at rungs that follow each other in memory.
void point_at_rungs(NestedMatrix* m, const uint8_t* p) {
  for (int r = 0; r < m->num_rungs; ++r) {
    m->rungs[r] = p;
    p += rung_bytes(*m, r);
  }
  if (m->basis_rank) m->basis = own_basis_of(*m);
}

/// Reads pages of a file, in pieces of 8 MiB.
void read_range(const File& file, uint64_t offset, size_t length, uint8_t* to) {
  if (offset % kPage) throw std::invalid_argument("read: offset must be a multiple of 4096");
  constexpr size_t kPiece = size_t(8) << 20;
  for (size_t at = 0; at < length; at += kPiece) {
    file.read_pages(offset + at, std::min(kPiece, length - at), to + at);
  }
}

}  // namespace

uint8_t* Arena::take(size_t bytes) {
  const size_t pages = round_up(bytes, system_page());
  if (pages > memory_.size() - taken_) {
    throw std::invalid_argument("arena: expected at most " + std::to_string(memory_.size() - taken_) + " bytes, got " +
                                std::to_string(pages));
  }
  uint8_t* p = memory_.bytes() + taken_;
  taken_ += pages;
  return p;
}

Scheme scheme_named(const std::string& name) {
  if (name == "nested") return Scheme::kNested;
  if (name == "mwq") return Scheme::kMwq;
  if (name == "mxfp4") return Scheme::kMxfp4;
  if (name == "nvfp4") return Scheme::kNvfp4;
  throw std::invalid_argument("scheme: expected nested, mwq, mxfp4 or nvfp4, got " + name);
}

void check_widths(Scheme scheme, const std::vector<uint8_t>& widths) {
  int bits = 0;
  for (uint8_t w : widths) bits += w == 0 ? 99 : w;
  if (widths.empty() || widths.size() > kMaxRungs || bits > 8) {
    throw std::invalid_argument("nested: a ladder has 1 to 8 rungs of at least 1 and together at most 8 bits");
  }
  if (scheme == Scheme::kMwq) {
    bool ok = widths[0] == 2 || widths[0] == 5;
    for (size_t r = 1; r < widths.size(); ++r) ok = ok && widths[r] == 1;
    if (!ok) throw std::invalid_argument("nested: a ladder of mwq has a base of 2 or 5 bits and rungs of 1 bit");
  }
  if (is_float4(scheme) && (widths.size() != 1 || widths[0] != 4)) {
    throw std::invalid_argument("nested: a ladder of mxfp4 or nvfp4 has one rung of 4 bits");
  }
}

uint8_t check_row_scales(Scheme scheme, const std::vector<uint8_t>& row_scales) {
  bool ok = !row_scales.empty() && row_scales.size() <= kMaxRungs && row_scales[0] == 1;
  uint8_t out = 0;
  for (size_t r = 0; r < row_scales.size(); ++r) {
    ok = ok && row_scales[r] <= (scheme == Scheme::kNested || r == 0 ? 1 : 0);
    out = uint8_t(out | (row_scales[r] << r));
  }
  if (!ok) throw std::invalid_argument("row_scales: expected 1, and then 1 or 0 for each rung of nested codes");
  return out;
}

void check_ranks(Scheme scheme, const std::vector<uint8_t>& ranks) {
  bool ok = ranks.size() <= kMaxRungs;
  for (const uint8_t r : ranks) ok = ok && r % kRankStep == 0 && r <= (scheme == Scheme::kNested ? kMaxRank : 0);
  if (!ok) throw std::invalid_argument("ranks: expected 0, 8, 16, 24 or 32 for each rung of nested codes");
}

int highest_rank(const std::vector<uint8_t>& ranks) {
  return ranks.empty() ? 0 : *std::max_element(ranks.begin(), ranks.end());
}

void check_shape(int rows, int cols) {
  expect_within("nested rows", rows, 1, kMaxSize);
  expect_within("nested cols", cols, 1, kMaxSize);
}

NestedMatrix hollow_matrix(int rows, int cols, const std::vector<uint8_t>& widths, const Coding& coding) {
  check_widths(coding.scheme, widths);
  check_shape(rows, cols);
  NestedMatrix m;
  m.scheme = coding.scheme;
  m.rows = rows;
  m.cols = cols;
  m.num_rungs = int(widths.size());
  m.row_scales = check_row_scales(coding.scheme, coding.row_scales);
  std::copy(widths.begin(), widths.end(), m.widths);
  check_ranks(coding.scheme, coding.ranks);
  if (!coding.ranks.empty()) {
    std::copy_n(coding.ranks.begin(), std::min(widths.size(), coding.ranks.size()), m.ranks);
    if (!coding.basis) m.basis_rank = uint8_t(highest_rank(coding.ranks));
  }
  return m;
}

std::unique_ptr<Nested> nested_from_rungs(const std::vector<RungBytes>& rungs, int rows, int cols,
                                          const std::vector<uint8_t>& widths, const Coding& coding) {
  NestedMatrix m = hollow_matrix(rows, cols, widths, coding);
  if (rungs.size() != widths.size()) throw std::invalid_argument("nested: expected one array per rung");
  size_t total = 0;
  for (int r = 0; r < m.num_rungs; ++r) {
    const size_t bytes = rung_bytes(m, r), got = rungs[size_t(r)].second;
    if (got != bytes) {
      throw std::invalid_argument("nested rung: expected shape [" + std::to_string(bytes) + "], got [" +
                                  std::to_string(got) + "]");
    }
    total += bytes;
  }
  const size_t shared = coding.basis ? highest_rank(coding.ranks) * basis_stride(cols) : 0;
  total += shared;
  const auto arena = std::make_shared<Arena>(total);
  uint8_t* const start = arena->take(total);
  uint8_t* p = start;
  for (const RungBytes& r : rungs) p = std::copy_n(r.first, r.second, p);
  point_at_rungs(&m, start);
  if (coding.basis) {
    std::copy_n(reinterpret_cast<const uint8_t*>(coding.basis), shared, p);
    m.basis = reinterpret_cast<const int8_t*>(p);
  }
  return std::make_unique<Nested>(Nested{m, round_up(total, system_page()), arena});
}

void check_stored(const NestedMatrix& m, const StoredRungs& stored) {
  const size_t count = size_t(m.num_rungs);
  if (stored.lengths.size() != count || stored.crcs.size() != count) {
    throw std::invalid_argument("nested: expected one length and one checksum per rung");
  }
  for (int r = 0; r < m.num_rungs; ++r) {
    if (stored.lengths[size_t(r)] != rung_bytes(m, r)) throw std::invalid_argument("nested: wrong length");
  }
}

void check_rung(const File& file, const std::string& name, int rung, uint32_t crc, uint32_t expected) {
  if (crc == expected) return;
  char text[96];
  std::snprintf(text, sizeof text, ", rung %d, is %08x; expected %08x", rung, crc, expected);
  throw FormatError(file.path() + ": checksum of tensor " + name + text);
}

std::unique_ptr<Nested> nested_from_file(const std::shared_ptr<Arena>& arena, const File& file,
                                         const StoredRungs& stored, int rows, int cols,
                                         const std::vector<uint8_t>& widths, bool verify, const std::string& name,
                                         const Coding& coding) {
  NestedMatrix m = hollow_matrix(rows, cols, widths, coding);
  check_stored(m, stored);
  const size_t total = std::accumulate(stored.lengths.begin(), stored.lengths.end(), size_t(0));
  const size_t bytes = round_up(total, system_page());
  uint8_t* const to = arena->take(total);
  read_range(file, stored.offset, bytes, to);
  point_at_rungs(&m, to);
  for (size_t r = 0; verify && r < widths.size(); ++r) {
    check_rung(file, name, int(r), crc32c(m.rungs[r], stored.lengths[r]), stored.crcs[r]);
  }
  return std::make_unique<Nested>(Nested{m, bytes, arena});
}

std::unique_ptr<Nested> first_rungs(const Nested& matrix, int rungs) {
  expect_within("rungs", rungs, 1, matrix.matrix.num_rungs);
  auto out = std::make_unique<Nested>(matrix);
  out->matrix.num_rungs = rungs;
  return out;
}

void share_basis(Nested& matrix, const Nested& other) {
  NestedMatrix& m = matrix.matrix;
  const NestedMatrix& o = other.matrix;
  if (matrix.arena != other.arena || m.cols != o.cols || !m.basis_rank || m.basis_rank > o.basis_rank) return;
  if (std::memcmp(m.basis, o.basis, m.basis_rank * basis_stride(m.cols)) == 0) m.basis = o.basis;
}

void read_f32(const File& file, uint64_t offset, size_t length, uint32_t crc, bool verify, const std::string& name,
              float* to) {
  const Memory memory(length);
  read_range(file, offset, memory.size(), memory.bytes());
  const uint32_t got = crc32c(memory.bytes(), length);
  if (verify && got != crc) {
    char text[64];
    std::snprintf(text, sizeof text, " is %08x; expected %08x", got, crc);
    throw FormatError(file.path() + ": checksum of tensor " + name + text);
  }
  std::copy_n(reinterpret_cast<const float*>(memory.bytes()), length / sizeof(float), to);
  if (!std::all_of(to, to + length / sizeof(float), [](float x) { return std::isfinite(x); })) {
    throw FormatError(file.path() + ": tensor " + name + " has a value that is not finite");
  }
}

}  // namespace edgemoe
