// Work that was told once and is repeated: what stands between two choices of its caller, who is not asked meanwhile.
#pragma once

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

namespace edgemoe {

/// Keeps pieces of work, each some steps. One caller at a time.
///
/// A step has the addresses and sizes of when it was told, which whoever tells it keeps in place. What is another each
/// time is what lies there, and the token's position.
class Notes {
 public:
  int pos = 0;  ///< of the token with which work is repeated

  bool is_open() const { return is_open_; }

  /// From now on steps are added instead of run.
  void begin() {
    if (is_open_) throw std::logic_error("notes: work is noted already");
    is_open_ = true;
    steps_.clear();
  }

  void add(std::function<void()> step) { steps_.push_back(std::move(step)); }

  /// Returns the number of what was added.
  int end() {
    is_open_ = false;
    steps_.shrink_to_fit();
    size_ += steps_.size();
    kept_[++last_] = std::move(steps_);
    steps_ = {};
    return last_;
  }

  void repeat(int number) const {
    const auto found = kept_.find(number);
    if (is_open_ || found == kept_.end()) throw std::invalid_argument("notes: there is no such work");
    for (const auto& step : found->second) step();
  }

  void forget(int number) {
    const auto found = kept_.find(number);
    if (found == kept_.end()) return;
    size_ -= found->second.size();
    kept_.erase(found);
  }

  /// Steps in all, some hundred bytes each.
  size_t size() const { return size_; }

 private:
  bool is_open_ = false;
  int last_ = 0;
  size_t size_ = 0;
  std::vector<std::function<void()>> steps_;
  std::unordered_map<int, std::vector<std::function<void()>>> kept_;
};

}  // namespace edgemoe
