#include "victims.h"

#include <algorithm>
#include <limits>

namespace edgemoe {

Victims::Victims(int num_layers, int num_experts)
    : num_experts_(num_experts),
      words_((size_t(num_experts) + 63) / 64),
      members_(size_t(num_layers) * words_, 0),
      slots_(size_t(num_layers) * size_t(num_experts), -1),
      rows_(size_t(num_layers)) {}

void Victims::add(int expert, int slot, const Policy& policy) {
  if (has(expert)) return;
  members_[word(expert)] |= uint64_t(1) << bit(expert);
  slots_[size_t(expert)] = slot;
  Row& row = rows_[size_t(expert / num_experts_)];
  if (!row.is_known) return;
  const double score = policy.raw()[expert];
  if (row.best < 0) {
    row.best = expert;
    row.least = score;
    row.next = std::numeric_limits<double>::infinity();
  } else if (score < row.least) {
    row.best = expert;
    row.next = row.least;
    row.least = score;
  } else if (score > row.least) {
    if (score < row.next) row.next = score;
  } else if (slot < slots_[size_t(row.best)]) {
    row.best = expert;
  }
}

void Victims::remove(int expert) {
  if (!has(expert)) return;
  members_[word(expert)] &= ~(uint64_t(1) << bit(expert));
  Row& row = rows_[size_t(expert / num_experts_)];
  if (row.best == expert) row.is_known = false;
}

template <typename Visit>
void Victims::each(int layer, Visit visit) const {
  const uint64_t* words = members_.data() + size_t(layer) * words_;
  for (size_t w = 0; w < words_; ++w) {
    for (uint64_t left = words[w]; left; left &= left - 1) {
      visit(layer * num_experts_ + int(w) * 64 + __builtin_ctzll(left));
    }
  }
}

Victims::Row Victims::look_through(int layer, const Policy& policy) const {
  const double* scores = policy.raw();
  int best = -1;
  double least = 0, next = std::numeric_limits<double>::infinity();
  each(layer, [&](int e) {
    const double score = scores[e];
    if (best < 0 || score < least) {
      if (best >= 0) next = least;
      best = e;
      least = score;
    } else if (score > least) {
      if (score < next) next = score;
    } else if (slots_[size_t(e)] < slots_[size_t(best)]) {
      best = e;
    }
  });
  return {best, least, next, policy.version(layer), true};
}

int Victims::lowest(const Policy& policy) {
  const int num_layers = int(rows_.size());
  int victim = -1;
  double least = 0, next = std::numeric_limits<double>::infinity();
  for (int layer = 0; layer < num_layers; ++layer) {
    Row& row = rows_[size_t(layer)];
    if (row.is_known && row.best < 0) continue;  // whatever its scores are
    if (!row.is_known || row.version != policy.version(layer)) row = look_through(layer, policy);
    if (row.best < 0) continue;
    const double score = policy.at(layer, row.least);
    next = std::min(next, policy.at(layer, row.next));
    if (victim < 0 || score < least || (score == least && slots_[size_t(row.best)] < slots_[size_t(victim)])) {
      victim = row.best;
      least = score;
    }
  }
  // A layer's scale and shift keep the order of its scores, but rounding may make some of them equal.
  const double* scores = policy.raw();
  for (int layer = 0; next == least && layer < num_layers; ++layer) {
    const Row& row = rows_[size_t(layer)];
    if (row.best < 0 || policy.at(layer, row.next) != least) continue;
    each(layer, [&](int e) {
      if (policy.at(layer, scores[e]) == least && slots_[size_t(e)] < slots_[size_t(victim)]) victim = e;
    });
  }
  return victim;
}

bool Victims::is_sound(const Policy& policy) const {
  for (int layer = 0; layer < int(rows_.size()); ++layer) {
    const Row& row = rows_[size_t(layer)];
    if (!row.is_known || row.version != policy.version(layer)) continue;
    const Row found = look_through(layer, policy);
    if (row.best != found.best || (row.best >= 0 && (row.least != found.least || row.next > found.next))) return false;
  }
  return true;
}

}  // namespace edgemoe
