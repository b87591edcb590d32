#include "llm2_fast/thread_pool.h"

#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace llm2_fast {
namespace {

constexpr int kSpins = 2000;    // some tens of microseconds of pauses
constexpr int kYields = 20000;  // some milliseconds of yielding; then sleep

void relax(int iteration) {
  if (iteration >= kSpins) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Where one thread of the pool waits for its next job, on cache lines of its own.
class alignas(128) Seat {
 public:
  void call() {
    called_.store(true);
    if (!sleeping_.load()) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }  // a thread about to sleep has either seen the call or sleeps by now
    wake_.notify_one();
  }

  // Returns once called, and clears the call.
  void await() {
    for (int i = 0; i < kSpins + kYields && !called_.load(); ++i) relax(i);
    if (!called_.load()) sleep();
    called_.store(false, std::memory_order_relaxed);  // the next call comes after this job
  }

 private:
  void sleep() {
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.store(true);
    wake_.wait(lock, [&] { return called_.load(); });
    sleeping_.store(false);
  }

  // Sequentially consistent, both: either the caller sees the sleeper or the sleeper sees the call.
  std::atomic<bool> called_{false};
  std::atomic<bool> sleeping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// As many threads as the largest job so far wanted, less the caller's. A smaller job calls the first of them only: the
// others neither wake nor look at it.
class ThreadPool {
 public:
  void run(int num_threads, int64_t num_phases, const std::function<void(Worker&)>& job) {
    while (static_cast<int>(seats_.size()) < num_threads - 1) add_thread();
    clear(num_threads, num_phases);
    job_ = &job;
    num_threads_ = num_threads;
    for (int index = 1; index < num_threads; ++index) seats_[static_cast<size_t>(index - 1)].call();
    work(0);
    finished_.wait(num_threads - 1);  // nobody uses the job any more
  }

 private:
  void add_thread() {
    Seat& seat = seats_.emplace_back();
    const int index = static_cast<int>(seats_.size());
    try {
      std::thread([this, &seat, index] {
        for (;;) {
          seat.await();
          work(index);
          finished_.done.fetch_add(1, std::memory_order_release);
        }
      }).detach();
    } catch (...) {
      seats_.pop_back();
      throw;
    }
  }

  void clear(int num_threads, int64_t num_phases) {
    const size_t phases = static_cast<size_t>(num_phases), shares = phases * static_cast<size_t>(num_threads);
    if (phases_.size() < phases) phases_ = std::vector<Phase>(phases);
    if (shares_.size() < shares) shares_ = std::vector<Share>(shares);
    for (size_t i = 0; i < phases; ++i) phases_[i].done.store(0, std::memory_order_relaxed);
    for (size_t i = 0; i < shares; ++i) shares_[i].taken.store(0, std::memory_order_relaxed);
    finished_.done = 0;
  }

  void work(int index) {
    Worker worker(index, num_threads_, phases_.data(), shares_.data());
    (*job_)(worker);
  }

  std::deque<Seat> seats_;  // which stay where they are
  // Of the job under way.
  const std::function<void(Worker&)>* job_ = nullptr;
  int num_threads_ = 0;
  std::vector<Phase> phases_;
  std::vector<Share> shares_;  // [phases, num_threads]
  Phase finished_;             // counts the threads that have left it
};

}  // namespace

void Phase::wait(int64_t items) const {
  for (int i = 0; !complete(items); i += i < kSpins) relax(i);
}

void run_parallel(int num_threads, int64_t num_phases, const std::function<void(Worker&)>& job) {
  if (num_threads <= 1) {
    Worker alone(0, 1, nullptr, nullptr);
    job(alone);
    return;
  }
  static std::mutex turn;
  // Never destroyed, as its threads never end. They do not exist after a fork.
  static ThreadPool* pool = nullptr;
  static pid_t owner = 0;
  const std::lock_guard<std::mutex> lock(turn);
  if (owner != getpid()) {
    pool = new ThreadPool;
    owner = getpid();
  }
  pool->run(num_threads, num_phases, job);
}

}  // namespace llm2_fast
