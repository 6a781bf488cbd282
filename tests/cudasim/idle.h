// A device that does nothing but count: its memory is the host's, copies are made at once, and kernels are not run.
#pragma once

#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "device/device.h"

namespace edgemoe {

/// Counts since the start: kernels, bytes of weights and of states that they would read, copies in and out.
struct Counts {
  uint64_t launches, weight_bytes, state_bytes, copies_in, copies_out;
};
inline Counts g_counts;

inline void launched(uint64_t kernels, uint64_t weights = 0, uint64_t states = 0) {
  g_counts.launches += kernels;
  g_counts.weight_bytes += weights;
  g_counts.state_bytes += states;
}

inline uint64_t bytes_of(const NestedMatrix& w) {
  uint64_t bytes = 0;
  for (int r = 0; r < w.num_rungs; ++r) bytes += rung_bytes(w.scheme, w.rows, w.cols, form_of(w, r));
  return bytes;
}

class IdleDevice : public Device {
 public:
  DeviceInfo info() const override {
    DeviceInfo out{};
    std::strcpy(out.name, "device that does nothing");
    out.major = 9;
    out.num_processors = 1;
    out.total_bytes = out.free_bytes = size_t(64) << 30;
    return out;
  }
  void* alloc(size_t bytes, Room) override { return std::calloc(bytes, 1); }
  void free(void* p, Room) noexcept override { std::free(p); }
  void fill(void* to, int byte, size_t n) override { std::memset(to, byte, n); }
  void copy_in(int, void* to, const void* pinned, size_t n) override {
    constexpr size_t kSmall = size_t(1) << 17;  // larger copies are of weights, which nobody reads
    if (n <= kSmall) std::memcpy(to, pinned, n);
    ++g_counts.copies_in;
  }
  void copy_out(int, void* pinned, const void* from, size_t n) override {
    std::memcpy(pinned, from, n);
    ++g_counts.copies_out;
  }
  void copy(void* to, const void* from, size_t n) override { std::memcpy(to, from, n); }
  Fence make_fence() override { return 0; }
  void record(Fence, int) override {}
  void wait(int, Fence) override {}
  bool is_done(Fence) override { return true; }
  void sync(Fence) override {}
  bool progress() override { return false; }
  void post(const PostCall& call) override {
    launched(1);
    is_noting_ ? posts_.push_back(call) : send(call);
  }
  static void send(const PostCall& call) {
    uint32_t* to = call.to;
    for (int i = 0; i < kMostPosted; to += call.sizes[i++]) {
      if (call.sizes[i]) std::memcpy(to, call.from[i], size_t(call.sizes[i]) * sizeof *to);
    }
    *call.turn = *call.number;
  }

  void begin_noting() override {
    before_ = g_counts;
    is_noting_ = true;
  }
  int end_noting() override {
    is_noting_ = false;
    const Counts &now = g_counts, &then = before_;
    made_.push_back(
        {{now.launches - then.launches, now.weight_bytes - then.weight_bytes, now.state_bytes - then.state_bytes, 0, 0},
         std::move(posts_)});
    posts_.clear();
    g_counts = before_;
    return int(made_.size()) - 1;
  }
  void repeat(int noted) override {
    const Noted& all = made_[size_t(noted)];
    launched(all.counts.launches, all.counts.weight_bytes, all.counts.state_bytes);
    for (const PostCall& call : all.posts) send(call);
  }
  void forget(int) noexcept override {}

  void choose(const ChooseCall& call, int T) override {
    for (int i = 0; !is_noting_ && i < T * call.rule.top_k; ++i) call.experts[i] = i % call.rule.top_k;
    launched(1);
  }
  void chosen_products(const ChosenCall& call) override {
    launched(1);
    for (int i = 0; i < call.count; ++i) {
      for (int p = 0; p < call.parts; ++p) launched(0, bytes_of(call.table[3 * i + call.first + p]));
    }
  }

  void quantize_rows(const RowsCall&, const QuantizedBuffer&) override { launched(1); }
  void quantize_hidden(Activation, const float*, const float*, int, int, const QuantizedBuffer&, float*) override {
    launched(1);
  }
  void ranks(const RanksCall* list, int count) override {
    for (int i = 0; i < count; ++i) launched(0, list[i].rank * basis_stride(list[i].x.cols));
    launched(uint64_t(blocks(count, 16)));
  }
  void products(const Product* list, int count) override {
    for (int i = 0; i < count; ++i) launched(0, bytes_of(list[i].w) * uint64_t(blocks(list[i].n, 4)));
    launched(uint64_t(blocks(count, 16)));
  }
  void matmul_f32(const float*, const float*, int, int rows, int cols, float*) override {
    launched(1, uint64_t(rows) * uint64_t(cols) * sizeof(float));
  }
  void norm_rows(float*, const float*, float, const float*, float, int, int, float*) override { launched(1); }
  void prepare_heads(const HeadsCall&, int) override { launched(1); }
  void attend(const AttendCall& call, int T, int) override {
    const KvLayer& kv = call.kv;
    uint64_t each = kv_tile_bytes(kv.key_type, kv.head_stride) / uint64_t(kv_tile_rows(kv.key_type));
    if (kv.values) each += kv_tile_bytes(kv.value_type, kv.head_stride) / uint64_t(kv_tile_rows(kv.value_type));
    const int pos = call.pos + (call.now ? *call.now : 0), seen = pos + T - first_seen(call.shape, pos);
    launched(2, 0, each * uint64_t(seen) * uint64_t(call.shape.num_kv_heads) * uint64_t(T));
  }
  void combine(const float*, const int32_t*, const float*, int, int, int, float*) override { launched(1); }
  void add_rows(const float*, float, const float*, const float*, int, int, float*) override { launched(1); }
  void add_bias(const float*, int, int, float*) override { launched(1); }
  void scale(float, size_t, float*) override { launched(1); }
  void multiply(const float*, size_t, size_t, float*) override { launched(1); }
  void weigh(const float*, const float*, int, int, float*) override { launched(1); }
  void gate_heads(float*, const float*, HeadGate, int, int, int) override { launched(1); }
  void gated_norm(float*, const float*, const float*, bool, float, Gate, int, int, int) override { launched(1); }
  void short_conv(const ConvShape&, const float*, const float*, const float*, const float*, float*, int,
                  float*) override {
    launched(1);
  }
  void delta_rule(const DeltaCall& call, int T) override {
    const DeltaShape& s = call.shape;
    const size_t state = size_t(s.value_heads) * size_t(s.key_dim) * size_t(s.value_dim) * sizeof(float);
    launched(2, 0, 3 * state * size_t(T));  // read twice, written once
  }
  void mamba2(const MambaCall& call, int T) override {
    const MambaShape& s = call.shape;
    launched(2, 0, 2 * size_t(s.num_heads) * size_t(s.state_dim) * size_t(s.head_dim) * sizeof(float) * size_t(T));
  }
  void prepare_latents(const LatentsCall&, int) override { launched(1); }

 private:
  /// Recorded work: its counts, and what it sends to the host.
  struct Noted {
    Counts counts;
    std::vector<PostCall> posts;
  };
  Counts before_{};
  bool is_noting_ = false;
  std::vector<PostCall> posts_;
  std::vector<Noted> made_;
};

}  // namespace edgemoe
