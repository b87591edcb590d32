// What the threads of a block compute together: reductions, the cutoff of a ranking, a sort. The size of the block is a
// multiple of 32 and at most 1024, and all of its threads call. Functions end with a barrier where shared memory was
// written that the caller reads, and begin with one where an earlier call may still be reading.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

namespace llm2_fast {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kInfinity = __builtin_inff();

using Word = unsigned long long;  // 64 bits, of the type that shuffles and atomics take

// --- ranking keys ----------------------------------------------------------------------------------------------------

// Larger for what ranks first by (logit descending, id ascending); never 0. The logit is not NaN; -0 ranks as +0.
__device__ inline Word rank_key(float logit, int32_t id) {
  const uint32_t bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
  const uint32_t ascending = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return static_cast<Word>(ascending) << 32 | (~static_cast<uint32_t>(id) ^ 0x80000000u);
}

__device__ inline float key_logit(Word key) {
  const uint32_t ascending = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(ascending ^ ((ascending >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

__device__ inline int32_t key_id(Word key) {
  return static_cast<int32_t>(~static_cast<uint32_t>(key) ^ 0x80000000u);
}

// --- reductions ------------------------------------------------------------------------------------------------------

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }  // ignores NaN
  __device__ Word operator()(Word a, Word b) const { return a > b ? a : b; }
};

struct Min {
  __device__ Word operator()(Word a, Word b) const { return a < b ? a : b; }
};

struct Sum {
  __device__ Word operator()(Word a, Word b) const { return a + b; }
};

// Of a set of logits.
struct Stats {
  float max;      // ignores NaN
  float sum_exp;  // of exp(z - max); NaN if a logit is NaN

  // No logit is NaN and the largest is finite.
  __device__ bool usable() const { return fabsf(max) <= FLT_MAX && sum_exp == sum_exp; }
  __device__ float logsumexp() const { return max + logf(sum_exp); }
};

constexpr Stats kNoLogits = {-kInfinity, 0.0f};

// While everything is -inf any finite base will do: the terms are 0, or NaN, which must not be lost.
__device__ inline float exp_base(float max) {
  return max == -kInfinity ? 0.0f : max;
}

struct Union {
  __device__ Stats operator()(Stats a, Stats b) const {
    const float max = fmaxf(a.max, b.max), base = exp_base(max);
    return {max, a.sum_exp * expf(a.max - base) + b.sum_exp * expf(b.max - base)};
  }
};

template <typename T>
__device__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(kAllLanes, value, lanes);
}

__device__ inline Stats shuffle_xor(Stats stats, int lanes) {
  return {shuffle_xor(stats.max, lanes), shuffle_xor(stats.sum_exp, lanes)};
}

// The same value in all lanes: `combine` is commutative, and the order of the terms is fixed.
template <typename T, typename Combine>
__device__ T reduce_warp(T value, Combine combine) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value = combine(value, shuffle_xor(value, lanes));
  return value;
}

struct ReduceScratch {
  Word warps[32];
};

// The same value in all threads.
template <typename T, typename Combine>
__device__ T reduce_block(T value, T neutral, Combine combine, ReduceScratch& scratch) {
  static_assert(sizeof(T) <= sizeof(Word), "a warp's value fits into its slot");
  T* warps = reinterpret_cast<T*>(scratch.warps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  value = reduce_warp(value, combine);
  __syncthreads();
  if (lane == 0) warps[warp] = value;
  __syncthreads();
  return reduce_warp(lane < num_warps ? warps[lane] : neutral, combine);
}

// --- cutoff of a ranking ---------------------------------------------------------------------------------------------

struct CutoffScratch {
  Word histogram[256];  // weight of the keys by their next byte
  int bucket;           // the one that holds the cutoff, -1 for none
  Word rest;            // weight that is missing up to the cutoff inside of the bucket
  Word weight;          // of the bucket
};

// Finds the bucket in which the weights, summed from the highest bucket down, reach `target`. By the first warp.
__device__ inline void choose_bucket(CutoffScratch& scratch, Word target) {
  const int lane = threadIdx.x, first = 255 - 8 * lane;  // a lane has the buckets (first - 8, first]
  Word own = 0;
  for (int i = 0; i < 8; ++i) own += scratch.histogram[first - i];
  Word sum = own;  // of all lanes up to this one
  for (int distance = 1; distance < 32; distance *= 2) {
    const Word other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31 && sum < target) scratch.bucket = -1;
  Word above = sum - own;
  if (above >= target || sum < target) return;
  int bucket = first;
  for (; above + scratch.histogram[bucket] < target; --bucket) above += scratch.histogram[bucket];
  scratch.bucket = bucket;
  scratch.rest = target - above;
  scratch.weight = scratch.histogram[bucket];
}

// The bound that exactly those keys reach which are needed, from the largest down, for weights that sum up to `target`
// or just more; 0 if all keys together weigh less. `visit(body)` calls body(key, weight) for the calling thread's share
// of the keys, which are distinct, and does so the same way whenever it is called. Keys of weight 0 do not count, and
// may reach the bound. Integer sums do not depend on the order of atomics.
template <typename Visit>
__device__ Word find_cutoff(const Visit& visit, Word target, CutoffScratch& scratch) {
  Word prefix = 0, mask = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) scratch.histogram[i] = 0;
    __syncthreads();
    visit([&](Word key, Word weight) {
      if ((key & mask) == prefix && weight > 0) atomicAdd(&scratch.histogram[(key >> shift) & 255], weight);
    });
    __syncthreads();
    if (threadIdx.x < 32) choose_bucket(scratch, target);
    __syncthreads();
    if (scratch.bucket < 0) return 0;
    prefix |= static_cast<Word>(scratch.bucket) << shift;
    mask |= Word{255} << shift;
    target = scratch.rest;
    if (target == scratch.weight) break;  // the whole bucket is needed
  }
  return prefix;
}

// --- sort ------------------------------------------------------------------------------------------------------------

// Sorts keys [size] in shared memory, largest first. `size` is a power of two.
__device__ inline void sort_descending(Word* keys, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int i = 2 * pair - pair % distance, j = i + distance;
        const bool descending = (i & run) == 0;
        const Word a = keys[i], b = keys[j];
        if ((a < b) != descending) continue;
        keys[i] = b;
        keys[j] = a;
      }
    }
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace llm2_fast
