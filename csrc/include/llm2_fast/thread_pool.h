// A small pool of threads that work through one job together, phase by phase.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "llm2_fast/ops.h"

namespace llm2_fast {

// Progress of one phase. On cache lines of its own, since all threads write it.
struct alignas(128) Phase {
  std::atomic<int64_t> next{0};  // items taken
  std::atomic<int64_t> done{0};  // items finished

  // Returns when `items` are done. Spins, since phases take microseconds; yields when that takes longer, since whoever
  // holds the last item may be waiting for this very core.
  void wait(int64_t items) const;
};

// One thread's view of a job.
class Worker {
 public:
  Worker(int index, int count, Phase* phases) : index_(index), count_(count), phase_(phases) {}

  int index() const { return index_; }

  // The next phase: calls work(range) until all of [0, items) is covered, by all workers together, and returns when all
  // of it is done; what was written is visible then. Workers take ranges as they come, so one that gets no processor
  // time holds up nobody unless it is in the middle of a range. All workers must go through the same phases.
  template <typename Work>
  void each(int64_t items, const Work& work) {
    if (count_ == 1) {
      if (items > 0) work(RowRange{0, items});
      return;
    }
    Phase& phase = *phase_++;
    const int64_t wanted = items / (int64_t{count_} * kRangesPerWorker), size = wanted > 1 ? wanted : 1;
    for (int64_t begin; (begin = phase.next.fetch_add(size, std::memory_order_relaxed)) < items;) {
      const int64_t end = begin + size < items ? begin + size : items;
      work(RowRange{begin, end});
      phase.done.fetch_add(end - begin, std::memory_order_release);
    }
    phase.wait(items);
  }

 private:
  static constexpr int kRangesPerWorker = 8;

  int index_;
  int count_;
  Phase* phase_;
};

// Calls job(worker) on `num_threads` threads, the calling one among them, and returns when all have finished. The job
// has at most `num_phases` phases, must not throw and must not start another. The other threads are kept: they spin for
// a moment, in case the next job comes soon, and then sleep. Jobs of different callers take turns. Throws
// std::bad_alloc, and std::system_error if threads cannot be started.
void run_parallel(int num_threads, int64_t num_phases, const std::function<void(Worker&)>& job);

}  // namespace llm2_fast
