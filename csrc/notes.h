// Work that is recorded once and then repeated without asking the caller: all that runs between two of its decisions.
#pragma once

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

namespace edgemoe {

/// Recorded pieces of work, each a list of steps. One caller at a time.
///
/// A step holds addresses and sizes as they were when it was recorded; whoever records it keeps them valid. Only the
/// values at these addresses and the token's position differ from one repetition to the next.
class Notes {
 public:
  int pos = 0;  ///< position of the token for which work is repeated

  bool is_open() const { return is_open_; }

  /// From now on steps are added instead of run.
  void begin() {
    if (is_open_) throw std::logic_error("notes: work is being recorded already");
    is_open_ = true;
    steps_.clear();
  }

  void add(std::function<void()> step) { steps_.push_back(std::move(step)); }

  /// Ends the recording. Returns the number by which it is repeated.
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
    if (is_open_ || found == kept_.end())
      throw std::invalid_argument("notes: expected the number of a finished recording");
    for (const auto& step : found->second) step();
  }

  void forget(int number) {
    const auto found = kept_.find(number);
    if (found == kept_.end()) return;
    size_ -= found->second.size();
    kept_.erase(found);
  }

  /// Steps of all recordings, some hundred bytes each.
  size_t size() const { return size_; }

 private:
  bool is_open_ = false;
  int last_ = 0;
  size_t size_ = 0;
  std::vector<std::function<void()>> steps_;
  std::unordered_map<int, std::vector<std::function<void()>>> kept_;
};

}  // namespace edgemoe
