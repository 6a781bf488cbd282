// A number that one thread writes and any other may read.
#pragma once

#include <atomic>

namespace edgemoe {

/// An atomic number at the cost of a plain one: no extra instruction, and no ordering between several. A thread that
/// reads several of them while they change sees values each of which was right a moment ago.
template <class T>
class Relaxed {
 public:
  Relaxed(T value = 0) : value_(value) {}
  Relaxed(const Relaxed& other) : value_(other) {}
  Relaxed& operator=(const Relaxed& other) { return *this = T(other); }
  Relaxed& operator=(T value) {
    value_.store(value, std::memory_order_relaxed);
    return *this;
  }
  operator T() const { return value_.load(std::memory_order_relaxed); }

  // Only one thread writes, so these need not be one atomic step.
  Relaxed& operator+=(T n) { return *this = T(T(*this) + n); }
  Relaxed& operator-=(T n) { return *this = T(T(*this) - n); }

 private:
  std::atomic<T> value_;
};

static_assert(sizeof(Relaxed<signed char>) == 1 && sizeof(Relaxed<unsigned>) == sizeof(unsigned),
              "a row of them is lent as an array");

}  // namespace edgemoe
