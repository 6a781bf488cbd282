// Rows of a matrix at all of its rungs, of which only the first few, or none, are resident. The missing rungs of a
// row's block are read from the file when the row is asked for.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "file.h"
#include "kernels/kernels.h"
#include "loader.h"
#include "matrix.h"
#include "memory.h"

namespace edgemoe {

/// A matrix whose rows are looked up in a file, as an embedding's, of which a token needs one. In one call, each block
/// of 16 rows is read once, near ones by one read, and several reads run at a time. With `verify`, a block's checksum
/// is compared with that at the start. Thread-safe.
class StoredRows {
 public:
  /// Reads through the missing rungs. Row scales and corrections, which are small, stay in memory. With `verify`, the
  /// rungs' checksums are compared, and the checksums of all blocks are kept; without it, only what stays in memory is
  /// read. `resident` has the matrix's first rungs, null for none. Throws std::invalid_argument when it has all of them
  /// or `stored` does not fit the matrix, ReadError, and FormatError when a checksum is wrong.
  StoredRows(std::shared_ptr<const File> file, const StoredRungs& stored, int rows, int cols,
             const std::vector<uint8_t>& widths, const Nested* resident, bool verify, std::string name,
             const Coding& coding);
  StoredRows(const StoredRows&) = delete;
  StoredRows& operator=(const StoredRows&) = delete;

  /// Bytes of memory that such an object takes beside its `resident` rungs.
  static size_t bytes_for(int rows, int cols, const std::vector<uint8_t>& widths, int resident, const Coding& coding);

  /// Writes rows `ids` [n], which are inside the matrix, times `scale` to out [n, cols]. Throws ReadError, and
  /// FormatError when a block has changed since the start; the object stays usable.
  void decode(const int32_t* ids, size_t n, float scale, float* out);

  int rows() const { return rows_; }
  int cols() const { return block_.cols; }
  size_t bytes() const { return memory_.size(); }

 private:
  struct Layout;

  /// The tiles of all blocks in one rung.
  struct Part {
    size_t stride;            ///< bytes of a block's tiles
    size_t to;                ///< where they start in the assembled block
    const uint8_t* resident;  ///< the first block's tiles, null where they are in the file
    uint64_t offset;          ///< of the first block's tiles in the file
    uint32_t* sums;           ///< [blocks], checksums
  };

  /// Blocks that are read together.
  struct Run {
    int first, last;
  };

  /// A range of a rung's bytes that stays in memory.
  struct Kept {
    size_t begin, length;
    uint8_t* to;
  };

  void go_through(const StoredRungs& stored, size_t rung, const Layout& at, const std::vector<Kept>& kept);
  void read(const std::vector<Run>& runs);
  void assemble(int block, size_t run);
  const float* find_recent(int32_t id) const;
  const float* decode_one(int32_t id);

  std::shared_ptr<const File> file_;
  std::shared_ptr<const Arena> arena_;  ///< of the resident rungs
  std::string name_;
  int rows_;
  bool verify_;
  NestedMatrix block_;  ///< the 16 rows in `assembled_`, at all rungs; its row scales are in rung 0
  Memory memory_;
  std::vector<Part> parts_;
  size_t num_missing_ = 0;
  size_t slot_ = 0;           ///< the most bytes that the reads of a rung take
  uint8_t* slots_ = nullptr;  ///< [missing rungs, slot_]
  uint8_t* assembled_ = nullptr;
  size_t assembled_bytes_ = 0;
  const uint8_t* scales_ = nullptr;      ///< of all rows; null for none
  const uint8_t* correction_ = nullptr;  ///< u, and the codes of all blocks; null for none
  float* recent_ = nullptr;              ///< [kRecent, cols], the rows that were decoded last
  std::vector<int32_t> recent_ids_;
  size_t next_recent_ = 0;
  std::mutex mutex_;
  std::vector<ReadJob> jobs_;
  std::unique_ptr<Loader> loader_;  // last: its threads end before what they write to is destroyed
};

}  // namespace edgemoe
