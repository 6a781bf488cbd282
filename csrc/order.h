// Which product follows which, so that threads which wait read what they will need.
#pragma once

#include <unordered_map>
#include <vector>

#include "kernels/kernels.h"
#include "threads.h"

namespace edgemoe {

/// What a thread reads first of matrices that lie one below the other, when its share begins at a row block of them
/// all.
Ahead ahead_of(const std::vector<const NestedMatrix*>& matrices, int block);

/// The same of a float32 matrix [rows, cols], from a row on.
Ahead ahead_of(const float* matrix, int rows, int cols, int row);

/// Learns the order of a token's products from the token before. Weights that are gone by now do no harm: nothing but
/// a hint is made of them.
class ProductOrder {
 public:
  static constexpr int kFewRows = 8;  ///< with more, computing takes longer than reading

  explicit ProductOrder(ThreadPool& pool) : pool_(pool) {}

  /// A product of n rows begins, whose weights lie at `key`. make(i) says what thread i reads of them first. What
  /// followed the last time is expected from now on.
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

  /// What follows now is chosen anew for each token; what comes after that is expected when `tell_next` is called.
  void choose() {
    if (last_) last_->by_choice = true;
  }
  void tell_next() {
    if (last_) tell(*last_);
  }

  /// Each thread's share of row blocks of the matrices, which are not part of the order.
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
