// A small pool of threads that work through one job together, phase by phase.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "llm2_fast/ops.h"

namespace llm2_fast {

// Items of one phase that a worker has taken from the share of one of them. On cache lines of its own, since others may
// write it.
struct alignas(128) Share {
  std::atomic<int64_t> taken{0};
};

// Progress of one phase.
struct alignas(128) Phase {
  std::atomic<int64_t> done{0};  // items finished

  bool complete(int64_t items) const { return done.load(std::memory_order_acquire) == items; }

  // Returns when `items` are done. Spins, since phases take microseconds; yields when that takes longer, since whoever
  // holds the last item may be waiting for this very core.
  void wait(int64_t items) const;
};

// One thread's view of a job.
class Worker {
 public:
  Worker(int index, int count, Phase* phases, Share* shares)
      : index_(index), count_(count), phase_(phases), shares_(shares) {}

  int index() const { return index_; }

  // This worker's share of [0, items): contiguous, so that it reads one stream of memory.
  RowRange share(int64_t items) const { return share_of(index_, items); }

  // The next phase: calls work(range) until all of [0, items) is covered, by all workers together, and returns when all
  // of it is done; what was written is visible then. A worker begins with its own share, in order, and then takes what
  // is left of the others', so one that gets no processor time holds up nobody unless it is in the middle of a range.
  // While others are still at it, `meanwhile()` is called until it returns false, at least once. All workers must go
  // through the same phases.
  template <typename Work, typename Meanwhile>
  void each(int64_t items, const Work& work, Meanwhile&& meanwhile) {
    if (count_ == 1) {
      if (items > 0) work(RowRange{0, items});
      return;
    }
    Phase& phase = *phase_++;
    Share* shares = shares_;
    shares_ += count_;
    for (int i = 0; i < count_; ++i) {
      const int owner = (index_ + i) % count_;
      const RowRange share = share_of(owner, items);
      const int64_t wanted = (share.end - share.begin) / kRangesPerShare, size = wanted > 1 ? wanted : 1;
      std::atomic<int64_t>& taken = shares[owner].taken;
      for (int64_t begin; (begin = share.begin + taken.fetch_add(size, std::memory_order_relaxed)) < share.end;) {
        const int64_t end = begin + size < share.end ? begin + size : share.end;
        work(RowRange{begin, end});
        phase.done.fetch_add(end - begin, std::memory_order_release);
      }
    }
    while (meanwhile() && !phase.complete(items)) {
    }
    phase.wait(items);
  }

  template <typename Work>
  void each(int64_t items, const Work& work) {
    each(items, work, [] { return false; });
  }

 private:
  static constexpr int64_t kRangesPerShare = 8;

  RowRange share_of(int index, int64_t items) const { return {items * index / count_, items * (index + 1) / count_}; }

  int index_;
  int count_;
  Phase* phase_;
  Share* shares_;
};

// Calls job(worker) on `num_threads` threads, the calling one among them, and returns when all have finished. The job
// has at most `num_phases` phases, must not throw and must not start another. The other threads are kept: they spin for
// a moment, in case the next job comes soon, and then sleep. Those that a smaller job does not need sit it out. Jobs of
// different callers take turns. Throws std::bad_alloc, and std::system_error if threads cannot be started.
void run_parallel(int num_threads, int64_t num_phases, const std::function<void(Worker&)>& job);

}  // namespace llm2_fast
