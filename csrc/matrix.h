// Matrices that stay resident, made from rungs in memory or read from a file.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "file.h"
#include "kernels/kernels.h"
#include "memory.h"

namespace edgemoe {

/// Memory that several matrices share, so that small ones lie in huge pages too. Handed out from its start.
class Arena {
 public:
  /// Makes an arena of `bytes`, all of which will be taken.
  explicit Arena(size_t bytes) : memory_(bytes) { memory_.prefer_huge_pages(); }

  /// Returns the next `bytes`, rounded up to whole system pages. Throws std::invalid_argument when fewer are left.
  uint8_t* take(size_t bytes);

 private:
  Memory memory_;
  size_t taken_ = 0;
};

/// A resident matrix and the memory that holds it. Immutable.
struct Nested {
  NestedMatrix matrix;
  size_t bytes;
  std::shared_ptr<const Arena> arena;
};

/// "nested", "mwq", "mxfp4" or "nvfp4". Throws std::invalid_argument for another name.
Scheme scheme_named(const std::string& name);

/// Throws std::invalid_argument unless `widths`, the bits that each rung adds, are a valid ladder of the scheme.
void check_widths(Scheme scheme, const std::vector<uint8_t>& widths);

/// Returns `NestedMatrix::row_scales` for one flag per rung; rungs beyond the flags have no row scales. Throws
/// std::invalid_argument unless the first flag is 1, and where others are set although the scheme is not nested, as its
/// scales then lie elsewhere.
uint8_t check_row_scales(Scheme scheme, const std::vector<uint8_t>& row_scales);

/// Throws std::invalid_argument unless `ranks`, one per rung's correction, are ones that a matrix of the scheme may
/// have.
void check_ranks(Scheme scheme, const std::vector<uint8_t>& ranks);

/// The rank of the basis V that corrections of these ranks share; 0 for none.
int highest_rank(const std::vector<uint8_t>& ranks);

/// What the planes mean, which rungs begin with row scales, and which end with a correction.
struct Coding {
  Scheme scheme;
  std::vector<uint8_t> row_scales;
  std::vector<uint8_t> ranks{};   ///< of each rung of the whole ladder; empty for no corrections
  const int8_t* basis = nullptr;  ///< V [highest rank, padded columns], copied; null where it is in rung 0
};

/// Where the bytes of one rung are, and how many.
using RungBytes = std::pair<const uint8_t*, size_t>;

/// Throws std::invalid_argument unless a matrix [rows, cols] is of a size that a model may have.
void check_shape(int rows, int cols);

/// Describes a matrix whose rungs are not in memory yet. Throws std::invalid_argument unless it is a valid one.
NestedMatrix hollow_matrix(int rows, int cols, const std::vector<uint8_t>& widths, const Coding& coding);

/// Copies the rungs of a matrix [rows, cols]. Throws std::invalid_argument unless each has the right number of bytes.
std::unique_ptr<Nested> nested_from_rungs(const std::vector<RungBytes>& rungs, int rows, int cols,
                                          const std::vector<uint8_t>& widths, const Coding& coding);

/// Where the rungs of a matrix lie in a file: one after the other from `offset` on, with a checksum each.
struct StoredRungs {
  uint64_t offset;
  std::vector<uint64_t> lengths;
  std::vector<uint32_t> crcs;
};

/// Throws std::invalid_argument unless `stored` has the lengths of the matrix's rungs, and a checksum for each.
void check_stored(const NestedMatrix& m, const StoredRungs& stored);

/// Throws FormatError when a rung's checksum `crc` is not `expected`. `name` is the tensor's.
void check_rung(const File& file, const std::string& name, int rung, uint32_t crc, uint32_t expected);

/// Reads a matrix [rows, cols] into an arena. `name` is the tensor's, for errors. Throws std::invalid_argument when the
/// lengths are not those of such a matrix, ReadError, and with `verify` FormatError when a checksum is wrong.
std::unique_ptr<Nested> nested_from_file(const std::shared_ptr<Arena>& arena, const File& file,
                                         const StoredRungs& stored, int rows, int cols,
                                         const std::vector<uint8_t>& widths, bool verify, const std::string& name,
                                         const Coding& coding);

/// The first `rungs` rungs of a matrix, in the memory that holds all of it. Throws std::invalid_argument unless it has
/// them.
std::unique_ptr<Nested> first_rungs(const Nested& matrix, int rungs);

/// Lets a matrix use the basis V of another of the same arena, if they are equal. Products of both with a row x then
/// compute V x once, and read V once.
void share_basis(Nested& matrix, const Nested& other);

/// Reads `length` bytes of float32 to `to`. Throws like `nested_from_file`, and FormatError, whatever `verify` is, for
/// a value that is not finite: an expert whose router has one would not be chosen, and nothing would show it.
void read_f32(const File& file, uint64_t offset, size_t length, uint32_t crc, bool verify, const std::string& name,
              float* to);

}  // namespace edgemoe
