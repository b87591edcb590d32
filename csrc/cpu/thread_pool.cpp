#include "llm2_fast/thread_pool.h"

#include <unistd.h>

#include <condition_variable>
#include <memory>
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

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads) : num_threads_(num_threads) {
    try {
      for (int index = 1; index < num_threads; ++index) threads_.emplace_back([this, index] { work(index); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~ThreadPool() { stop(); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  void run(int64_t num_phases, const std::function<void(Worker&)>& job) {
    if (num_phases > capacity_) {
      phases_.reset(new Phase[static_cast<size_t>(num_phases)]);
      shares_.reset(new Share[static_cast<size_t>(num_phases * num_threads_)]);
      capacity_ = num_phases;
    }
    for (int64_t i = 0; i < num_phases; ++i) phases_[static_cast<size_t>(i)].done.store(0, std::memory_order_relaxed);
    for (int64_t i = 0; i < num_phases * num_threads_; ++i) {
      shares_[static_cast<size_t>(i)].taken.store(0, std::memory_order_relaxed);
    }
    finished_.done = 0;
    job_ = &job;
    announce();
    Worker worker(0, num_threads_, phases_.get(), shares_.get());
    job(worker);
    finished_.wait(num_threads_ - 1);  // nobody uses the job any more
  }

 private:
  // Makes the threads look: at a new job, or at none, which ends them.
  void announce() {
    announced_.fetch_add(1);
    if (sleeping_.load() == 0) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }  // a thread about to sleep has either seen it or sleeps by now
    wake_.notify_all();
  }

  void stop() {
    job_ = nullptr;
    announce();
    for (std::thread& thread : threads_) thread.join();
  }

  void work(int index) {
    for (uint32_t seen = 0;;) {
      await(seen++);
      if (job_ == nullptr) return;
      Worker worker(index, num_threads_, phases_.get(), shares_.get());
      (*job_)(worker);
      finished_.done.fetch_add(1, std::memory_order_release);
    }
  }

  // Returns once more than `seen` announcements were made.
  void await(uint32_t seen) {
    for (int i = 0; i < kSpins + kYields; ++i) {
      if (announced_.load() != seen) return;
      relax(i);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return announced_.load() != seen; });
    sleeping_.fetch_sub(1);
  }

  const int num_threads_;
  std::unique_ptr<Phase[]> phases_;
  std::unique_ptr<Share[]> shares_;  // [phases, num_threads]
  int64_t capacity_ = 0;
  Phase finished_;  // counts the threads that have left the job
  const std::function<void(Worker&)>* job_ = nullptr;
  // Sequentially consistent, both: either the announcer sees the sleeper or the sleeper sees the announcement.
  std::atomic<uint32_t> announced_{0};
  std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
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
  // Never destroyed: its threads may be gone by the time destructors of statics run, and do not exist after a fork.
  static ThreadPool* pool = nullptr;
  static pid_t owner = 0;
  const std::lock_guard<std::mutex> lock(turn);
  if (pool != nullptr && owner == getpid() && pool->num_threads() != num_threads) {
    delete pool;
    pool = nullptr;
  }
  if (pool == nullptr || owner != getpid()) {
    pool = new ThreadPool(num_threads);
    owner = getpid();
  }
  pool->run(num_phases, job);
}

}  // namespace llm2_fast
