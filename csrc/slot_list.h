// Slots in the order in which they were added; any of them can be removed in constant time.
#pragma once

#include <cstddef>
#include <vector>

namespace edgemoe {

/// A doubly linked list over the numbers [0, size).
class SlotList {
 public:
  void resize(size_t size) { links_.resize(size); }

  bool has(int slot) const { return links_[size_t(slot)].is_in; }
  int count() const { return count_; }
  /// The first and the last slot; -1 when the list is empty.
  int first() const { return first_; }
  int last() const { return last_; }
  /// The slot after one that is in the list; -1 after the last.
  int after(int slot) const { return links_[size_t(slot)].after; }

  /// Appends a slot that is not in the list.
  void push(int slot) {
    links_[size_t(slot)] = {last_, -1, true};
    (last_ < 0 ? first_ : links_[size_t(last_)].after) = slot;
    last_ = slot;
    ++count_;
  }

  /// Removes a slot that is in the list.
  void remove(int slot) {
    Link& link = links_[size_t(slot)];
    (link.before < 0 ? first_ : links_[size_t(link.before)].after) = link.after;
    (link.after < 0 ? last_ : links_[size_t(link.after)].before) = link.before;
    link.is_in = false;
    --count_;
  }

 private:
  struct Link {
    int before = -1, after = -1;
    bool is_in = false;
  };
  std::vector<Link> links_;
  int first_ = -1, last_ = -1;
  int count_ = 0;
};

}  // namespace edgemoe
