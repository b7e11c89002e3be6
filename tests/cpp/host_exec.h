// Executes the phases of csrc/cuda/group_norm/phases.cuh on the host, for all threads of a cluster.
//
// Phases are deferred until the next barrier, then run warp by warp, and between barriers of the
// cluster block by block, forwards or backwards: a missing barrier changes the results. Shared
// memory is filled with NaN when a block starts.
#pragma once

#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "cuda/group_norm/phases.cuh"

namespace ddpm::test {

template <class ThreadState>
class HostExec {
 public:
  using Thread = ThreadState;

  HostExec(const BlockIndex& first_block, const NormLaunch& how, bool backwards)
      : backwards_(backwards), blocks_(1u << how.cluster_bits), threads_(how.threads) {
    states_.resize(blocks_ * threads_);
    shared_.resize(blocks_,
                   std::vector<Line>((how.shared_bytes + sizeof(Line) - 1) / sizeof(Line)));
    for (uint32_t block = 0; block < blocks_; ++block) {
      BlockIndex index = first_block;
      index.x += block;
      for (uint32_t thread = 0; thread < threads_; ++thread) {
        Thread& t = states_[block * threads_ + thread];
        t.position = norm_position(index, how.cluster_bits, thread);
        t.shared = shared_[block][0].v;
      }
    }
    start_ = true;
  }

  template <class Params>
  void begin(const Params& params) {
    for (Thread& t : states_) t.begin(params);
  }

  void each(std::function<void(Thread&)> f) { steps_.push_back({kEach, std::move(f), {}, {}, 0}); }
  void xor_add(std::function<float&(Thread&)> value, uint32_t lanes) {
    steps_.push_back({kAdd, {}, std::move(value), {}, lanes});
  }
  void each_cluster_block(uint32_t blocks, std::function<void(Thread&, float*)> f) {
    steps_.push_back({kClusterBlock, {}, {}, std::move(f), blocks});
  }
  void block_sync() { steps_.push_back({kSync, {}, {}, {}, 0}); }
  void cluster_sync() { flush(); }
  void cluster_arrive() {}
  void cluster_wait() { flush(); }
  void wait_for_previous() {}
  void release_next() {}

  void flush() {
    for (uint32_t i = 0; i < blocks_; ++i) run_block(backwards_ ? blocks_ - 1 - i : i);
    steps_.clear();
    start_ = false;
  }

 private:
  struct alignas(16) Line {
    float v[4];
  };
  enum Kind { kEach, kAdd, kClusterBlock, kSync };
  struct Step {
    Kind kind;
    std::function<void(Thread&)> each;
    std::function<float&(Thread&)> value;
    std::function<void(Thread&, float*)> cluster_block;
    uint32_t number;
  };

  void run_block(uint32_t block) {
    if (start_) {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      for (Line& line : shared_[block]) line = {{nan, nan, nan, nan}};
    }
    for (size_t from = 0; from < steps_.size();) {
      size_t to = from;
      while (to < steps_.size() && steps_[to].kind != kSync) ++to;
      const uint32_t warps = threads_ / 32;
      for (uint32_t i = 0; i < warps; ++i) {
        const uint32_t warp = backwards_ ? warps - 1 - i : i;
        for (size_t s = from; s < to; ++s) {
          run_warp(&states_[block * threads_ + warp * 32], steps_[s]);
        }
      }
      from = to + 1;
    }
  }

  void run_warp(Thread* lanes, const Step& step) {
    float before[32];
    for (uint32_t i = 0; i < 32; ++i) {
      const uint32_t lane = backwards_ ? 31 - i : i;
      if (step.kind == kEach) step.each(lanes[lane]);
      if (step.kind == kClusterBlock && lane < step.number)
        step.cluster_block(lanes[lane], shared_[lane][0].v);
      if (step.kind == kAdd) before[lane] = step.value(lanes[lane]);
    }
    if (step.kind != kAdd) return;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      step.value(lanes[lane]) = before[lane] + before[lane ^ step.number];
    }
  }

  bool backwards_, start_;
  uint32_t blocks_, threads_;
  std::vector<Thread> states_;
  std::vector<std::vector<Line>> shared_;
  std::vector<Step> steps_;
};

constexpr int kNotRun = -1;

// Runs every block of a launch of a plan.
template <class T>
int run_plan(const GroupNormArgs& args, const NormPlan& plan, bool backwards) {
  return choose_norm<T>(args, plan, [=](auto kernel, const auto& params, const NormLaunch& how) {
    using Kernel = decltype(kernel);
    const uint32_t blocks_y = static_cast<uint32_t>(how.blocks.y);
    if (how.threads > Kernel::kMostThreads || how.threads % 32 != 0) return kNotRun;
    for (uint32_t z = 0; z < how.blocks.z; ++z) {
      for (uint32_t y = 0; y < how.blocks.y; ++y) {
        if (static_cast<int64_t>(z) * blocks_y + y >= params.samples) continue;
        for (uint32_t x = 0; x < how.blocks.x; x += 1u << how.cluster_bits) {
          HostExec<typename Kernel::Thread> exec({x, y, z, blocks_y}, how, backwards);
          exec.begin(params);
          Kernel::run(params, exec);
          exec.flush();
        }
      }
    }
    return 0;
  });
}

// Without bfloat16, which differs from float16 only in its conversions: see test_half.cpp.
inline int run_plan(const GroupNormArgs& args, const NormPlan& plan, bool backwards = false) {
  switch (args.dtype) {
    case DType::f16:
      return run_plan<half_t>(args, plan, backwards);
    case DType::f32:
      return run_plan<float>(args, plan, backwards);
    default:
      return kNotRun;
  }
}

}  // namespace ddpm::test
