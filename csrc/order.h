// Which product follows which, so that waiting threads can prefetch what they will need.
#pragma once

#include <unordered_map>
#include <vector>

#include "kernels/kernels.h"
#include "threads.h"

namespace edgemoe {

/// What a thread reads first when its share begins at row block `block` of several matrices on top of each other.
Ahead ahead_of(const std::vector<const NestedMatrix*>& matrices, int block);

/// The same for a float32 matrix [rows, cols], from row `row` on.
Ahead ahead_of(const float* matrix, int rows, int cols, int row);

/// The order of a token's products, learned from the token before. Weights that have been freed since do no harm: their
/// addresses only become prefetch hints.
class ProductOrder {
 public:
  static constexpr int kFewRows = 8;  ///< with more rows, computing takes longer than reading

  explicit ProductOrder(ThreadPool& pool) : pool_(pool) {}

  /// Says that a product of n rows begins, whose weights lie at `key`. make(i) returns what thread i reads of them
  /// first. From now on, threads expect the product that followed this one the last time.
  template <class Make>
  void begin(const void* key, int n, Make make) {
    if (n > kFewRows) {
      last_ = nullptr;
      return;
    }
    if (last_ && last_->next != key) {
      last_->next = key;
      last_->ahead.clear();
      for (int i = 0; i < pool_.size(); ++i) last_->ahead.push_back(make(i));
    }
    last_ = &after_[key];
    if (!last_->by_choice) tell(*last_);
  }

  /// Says that what follows now is chosen anew for each token, as experts are. What comes after it is expected only
  /// once `tell_next` is called.
  void choose() {
    if (last_) last_->by_choice = true;
  }
  void tell_next() {
    if (last_) tell(*last_);
  }

  /// Makes each thread expect its share of the row blocks of these matrices, which are not part of the order.
  void tell(const std::vector<const NestedMatrix*>& matrices, int grain);

 private:
  struct After {
    const void* next = nullptr;
    std::vector<Ahead> ahead;  ///< of each thread
    bool by_choice = false;
  };

  void tell(const After& after);

  ThreadPool& pool_;
  std::unordered_map<const void*, After> after_;
  After* last_ = nullptr;
};

}  // namespace edgemoe
