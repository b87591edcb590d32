#include "large_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define LLM2_FAST_ADDRESS_SANITIZER
#elif defined(__has_feature)  // how older versions of Clang tell
#if __has_feature(address_sanitizer)
#define LLM2_FAST_ADDRESS_SANITIZER
#endif
#endif

namespace llm2_fast {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kLargePage = int64_t{2} << 20;
#ifdef LLM2_FAST_ADDRESS_SANITIZER
constexpr int64_t kRegionBytes = 0;  // each allocation in a region of its own, at whose end overruns are seen
#else
constexpr int64_t kRegionBytes = int64_t{32} << 20;  // addresses; pages get memory when they are written
#endif

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Addresses from which allocations are cut one after another.
class Region {
 public:
  explicit Region(int64_t bytes) : mapped_(bytes + kLargePage) {
    void* mapped =
        mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<char*>(mapped);
    next_ = mapping_ + (kLargePage - reinterpret_cast<uintptr_t>(mapping_) % kLargePage) % kLargePage;
    end_ = next_ + bytes;
#ifdef MADV_HUGEPAGE
    madvise(next_, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // advice: failure changes nothing
#endif
  }
  ~Region() { munmap(mapping_, static_cast<size_t>(mapped_)); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Null if there is too little left.
  void* take(int64_t bytes) {
    if (end_ - next_ < bytes) return nullptr;
    void* taken = next_;
    next_ += bytes;
    return taken;
  }

 private:
  const int64_t mapped_;
  char* mapping_;
  char* next_;
  char* end_;
};

}  // namespace

std::shared_ptr<void> allocate_in_large_pages(int64_t bytes) {
  static std::mutex turn;
  static std::weak_ptr<Region> current;  // kept by what was allocated in it
  const int64_t size = round_up(std::max<int64_t>(bytes, 1), kAlignment);
  const std::lock_guard<std::mutex> lock(turn);
  std::shared_ptr<Region> region = current.lock();
  void* data = region == nullptr ? nullptr : region->take(size);
  if (data == nullptr) {
    region = std::make_shared<Region>(std::max(kRegionBytes, round_up(size, kLargePage)));
    current = region;
    data = region->take(size);
  }
  return {region, data};
}

}  // namespace llm2_fast
