// The phases of group_norm_ and the barriers between them, independent of how threads are executed.
//
// An Exec may defer a phase until the next barrier, so that a phase must capture everything except
// the parameters by value. An Exec has
//   each(f): f of every thread
//   xor_add(f, lanes): add to the float f of every thread that of the thread with index ^ lanes
//   each_cluster_block(n, f): f of lane i < n of every warp with the shared memory of block i
//   block_sync(): a barrier of the block
//   cluster_sync(): a barrier of all blocks of a cluster
//   cluster_arrive(), cluster_wait(): the same in two calls; after it all blocks have started
//   wait_for_previous(): wait for the previous kernel, before any global memory is accessed
//   release_next(): allow the next kernel to start, up to its own wait_for_previous()
#pragma once

#include "cuda/group_norm/strided.cuh"

namespace ddpm {

template <class Exec>
DDPM_HD void sum_warps(Exec& exec, uint32_t from_lanes) {
  for (uint32_t lanes = from_lanes; lanes < 32; lanes *= 2) {
    exec.xor_add([](auto& t) -> float& { return t.sum; }, lanes);
  }
}

// Reduces the partial sums of the threads to the constants of the channels.
template <class Exec>
DDPM_HD void reduce(const NormParams& p, Exec& exec, uint32_t pass) {
  using Thread = typename Exec::Thread;
  if (p.plan.shuffled) {
    DDPM_UNROLL
    for (uint32_t k = 0; k < Thread::kValues; ++k) {
      if (k >= Thread::kValues / p.plan.unit) continue;
      for (uint32_t lanes = p.plan.columns; lanes < 32; lanes *= 2) {
        exec.xor_add([k](auto& t) -> float& { return t.part[k]; }, lanes);
      }
    }
  }
  exec.each([&p](Thread& t) { t.store_parts(p); });
  exec.block_sync();
  // The shared memory of another block may be written only after that block has started.
  if (p.plan.cluster_bits > 0 && pass == 0) exec.cluster_wait();
  const uint32_t rounds = Thread::rounds(p);
  for (uint32_t round = 0; round < rounds; ++round) {
    exec.each([&p, round](Thread& t) { t.gather(p, round); });
    sum_warps(exec, 1);
    if (p.plan.cluster_bits == 0) {
      exec.each([&p, round, pass](Thread& t) { t.finish(p, round, pass); });
    } else {
      exec.each_cluster_block(p.plan.cluster(), [&p, round, pass](Thread& t, float* memory) {
        t.send(p, round, pass, memory);
      });
    }
  }
  if (p.plan.cluster_bits > 0) {
    exec.cluster_sync();
    for (uint32_t round = 0; round < rounds; ++round) {
      exec.each([&p, round, pass](Thread& t) {
        t.receive(p, round, pass);
        t.finish(p, round, pass);
      });
    }
  }
  exec.block_sync();
}

template <class T, bool kSum, int kHeld, bool kStream, class Exec>
DDPM_HD void run_vectorized(const NormParams& p, Exec& exec) {
  using Thread = VectorizedThread<T, kSum, kHeld, kStream>;
  if (p.plan.cluster_bits > 0) exec.cluster_arrive();
  exec.each([&p](Thread& t) { t.prefetch(p); });
  exec.wait_for_previous();
  exec.each([&p](Thread& t) {
    if constexpr (!kStream) t.load(p, 0);
    t.stage(p);
  });
  exec.release_next();
  exec.block_sync();
  exec.each([&p](Thread& t) { t.sums(p); });
  reduce(p, exec, 0);
  exec.each([&p](Thread& t) { t.squares(p); });
  reduce(p, exec, 1);
  exec.each([&p](Thread& t) { t.apply(p); });
}

template <class T, class Exec>
DDPM_HD void run_strided(const StridedParams& p, Exec& exec) {
  using Thread = StridedThread<T>;
  exec.wait_for_previous();
  exec.each([&p](Thread& t) {
    t.load_row(p);
    t.template sums<false>(p);
  });
  sum_warps(exec, 1);
  exec.each([&p](Thread& t) { t.store_part(0); });
  exec.block_sync();
  exec.each([&p](Thread& t) {
    t.finish(p, 0);
    t.template sums<true>(p);
  });
  sum_warps(exec, 1);
  exec.each([&p](Thread& t) { t.store_part(1); });
  exec.block_sync();
  exec.release_next();
  exec.each([&p](Thread& t) {
    t.finish(p, 1);
    t.apply(p);
  });
}

// The kernels: thread state, parameters and entry point.
template <class T, bool kSum, int kHeld, bool kStream>
struct VectorizedKernel {
  using Thread = VectorizedThread<T, kSum, kHeld, kStream>;
  using Params = NormParams;
  static constexpr bool kFull = !kStream && kHeld == (kSum ? kMostHeldSum : kMostHeld);
  static constexpr uint32_t kMostThreads = kFull ? kNormThreads : kNormFewThreads;

  template <class Exec>
  static DDPM_HD void run(const Params& p, Exec& exec) {
    run_vectorized<T, kSum, kHeld, kStream>(p, exec);
  }
};

template <class T>
struct StridedKernel {
  using Thread = StridedThread<T>;
  using Params = StridedParams;
  static constexpr uint32_t kMostThreads = kStridedThreads;

  template <class Exec>
  static DDPM_HD void run(const Params& p, Exec& exec) {
    run_strided<T>(p, exec);
  }
};

struct NormLaunch {
  Blocks blocks;
  uint32_t threads, cluster_bits, shared_bytes;
};

inline Blocks norm_blocks(int64_t samples, int64_t blocks_of_sample) {
  constexpr int64_t kMaxY = 65535;
  const int64_t y = samples < kMaxY ? samples : kMaxY;
  return {blocks_of_sample, y, y > 0 ? ceil_div(samples, y) : 0};
}

DDPM_HD NormPosition norm_position(const BlockIndex& block, uint32_t cluster_bits,
                                   uint32_t thread) {
  const int64_t sample = static_cast<int64_t>(block.z) * block.blocks_y + block.y;
  const uint32_t slab = block.x >> cluster_bits;
  return {sample, slab, block.x - (slab << cluster_bits), thread};
}

template <class T, bool kSum, int kHeld, class Launch>
int choose_held(const NormParams& p, const NormLaunch& how, Launch launch) {
  if constexpr (kHeld > 1) {
    if (p.plan.held < kHeld) return choose_held<T, kSum, kHeld / 2>(p, how, launch);
  }
  return launch(VectorizedKernel<T, kSum, kHeld, false>{}, p, how);
}

// Calls launch(kernel, params, how) for the kernel that fits the arguments, and returns its result.
template <class T, class Launch>
int choose_norm(const GroupNormArgs& a, const NormPlan& plan, Launch launch) {
  if (!plan.vectorized) {
    const NormLaunch how{norm_blocks(a.samples, a.groups), kStridedThreads, 0,
                         2 * kStridedWarps * 4};
    return launch(StridedKernel<T>{}, strided_params(a), how);
  }
  const NormParams p = norm_params(a, plan);
  const NormLaunch how{norm_blocks(a.samples, a.channels() / plan.slab * plan.cluster()),
                       plan.threads, plan.cluster_bits, plan.shared_bytes};
  if (plan.stream) return launch(VectorizedKernel<T, true, kNormStreamed, true>{}, p, how);
  return keeps_sum(a) ? choose_held<T, true, kMostHeldSum>(p, how, launch)
                      : choose_held<T, false, kMostHeld>(p, how, launch);
}

}  // namespace ddpm
