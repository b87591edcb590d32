#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;

enum class State { kReady, kAtBlock, kAtWarp, kReturned };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t context;
  unsigned index;
  State state;
  unsigned lanes;              // that it waits for
  uint64_t slots[2] = {0, 0};  // what it gives to its warp, in turn: one may still be read when the next is written
  unsigned exchanges = 0;
  void* fake_stack = nullptr;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::mt19937 order(1);
ucontext_t scheduler;
Fiber* running;
const std::function<void()>* body;

// AddressSanitizer has to know which stack is in use.
#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
size_t scheduler_stack_bytes;
void leave(void** fake_stack, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, size);
}
void arrive(void* fake_stack, const void** bottom, size_t* size) {
  __sanitizer_finish_switch_fiber(fake_stack, bottom, size);
}
#else
const void* scheduler_stack;
size_t scheduler_stack_bytes;
void leave(void**, const void*, size_t) {}
void arrive(void*, const void**, size_t*) {}
#endif

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "emulator: block %u: %s\n", blockIdx.x, message.c_str());
  std::abort();
}

int64_t count(State state) {
  return std::count_if(fibers.begin(), fibers.end(), [&](const auto& fiber) { return fiber->state == state; });
}

void start() {
  arrive(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  running->state = State::kReturned;
  leave(nullptr, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&running->context, &scheduler);
}

// Back to the scheduler, until the wait is over.
void wait(State state) {
  Fiber* self = running;
  self->state = state;
  leave(&self->fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&self->context, &scheduler);
  arrive(self->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx.x = fiber.index;
  void* fake_stack;
  leave(&fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  arrive(fake_stack, nullptr, nullptr);
}

void prepare(unsigned block_size) {
  while (fibers.size() < block_size) fibers.emplace_back(new Fiber);
  fibers.resize(block_size);
  for (unsigned i = 0; i < block_size; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.index = i;
    fiber.state = State::kReady;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
}

// Whether all lanes that the fiber waits for wait for the same lanes.
bool warp_is_complete(const Fiber& fiber) {
  const unsigned first = fiber.index / 32 * 32;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((fiber.lanes >> lane & 1) == 0) continue;
    const Fiber& other = *fibers[first + lane];
    if (other.state != State::kAtWarp || other.lanes != fiber.lanes) return false;
  }
  return true;
}

// Runs the threads of a warp until all of them wait for the block or have returned.
void run_warp(unsigned warp) {
  std::vector<Fiber*> lanes;
  for (unsigned lane = 0; lane < 32; ++lane) lanes.push_back(fibers[warp * 32 + lane].get());
  for (;;) {
    std::shuffle(lanes.begin(), lanes.end(), order);
    for (Fiber* fiber : lanes) {
      if (fiber->state == State::kReady) resume(*fiber);
    }
    std::vector<Fiber*> released;
    for (Fiber* fiber : lanes) {
      if (fiber->state == State::kAtWarp && warp_is_complete(*fiber)) released.push_back(fiber);
    }
    if (released.empty()) return;
    for (Fiber* fiber : released) fiber->state = State::kReady;
  }
}

void run_block() {
  std::vector<unsigned> warps(fibers.size() / 32);
  std::iota(warps.begin(), warps.end(), 0);
  for (;;) {
    // One warp after the other gets as far as it can: the first may be at the next barrier before the last has begun.
    std::shuffle(warps.begin(), warps.end(), order);
    for (unsigned warp : warps) run_warp(warp);
    const int64_t returned = count(State::kReturned), waiting = count(State::kAtBlock);
    const int64_t all = static_cast<int64_t>(fibers.size());
    if (returned == all) return;
    if (waiting != all) {
      fail(std::to_string(returned) + " threads have returned, " + std::to_string(waiting) + " wait for all of " +
           std::to_string(all) + ", and the others for lanes of their warp");
    }
    for (const auto& fiber : fibers) fiber->state = State::kReady;
  }
}

}  // namespace

void run(unsigned num_blocks, unsigned block_size, const std::function<void()>& thread) {
  if (block_size == 0 || block_size % 32 != 0 || block_size > 1024) fail("blocks have 32 to 1024 threads, in warps");
  std::vector<unsigned> blocks(num_blocks);
  for (unsigned i = 0; i < num_blocks; ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), order);
  blockDim = dim3(block_size);
  body = &thread;
  for (unsigned block : blocks) {
    blockIdx = dim3(block);
    prepare(block_size);
    run_block();
  }
}

void wait_for_block() {
  wait(State::kAtBlock);
}

uint64_t exchange(unsigned lanes, uint64_t bytes, unsigned source) {
  const unsigned turn = running->exchanges++ % 2;
  running->slots[turn] = bytes;
  running->lanes = lanes;
  const Fiber& other = *fibers[running->index / 32 * 32 + source];
  wait(State::kAtWarp);
  return other.slots[turn];
}

}  // namespace emulator
