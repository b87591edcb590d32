// Plausible candidates, C = {v : z_v >= max z + ln(alpha)} (LLM2, equation 1), in two stages.
//
// 1. A block per chunk of 4,096 logits reads them once, into registers, and leaves their maximum, their sum of
//    exponentials and the keys of those that can be candidates. The threshold of a chunk is at most that of the row,
//    since rounding is monotone, and of the plausible tokens of a chunk only the first K + 1 matter: K to be chosen,
//    and one to know that the row has more than K.
// 2. A block per row combines the chunks, keeps the keys that reach the threshold of the row, and sorts the first K.
//
// Chunks begin at multiples of 4,096 and a logit's thread follows from its position, so sums have one order whatever
// the batch. Memory: every logit is read once; stage 2 reads a few kilobytes per row.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstring>

#include "block.cuh"
#include "launch.cuh"
#include "ops.h"

namespace llm2_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 4096;
constexpr int kPerThread = kChunk / kThreads;
static_assert(kMaxCandidates + 1 <= kChunk, "a chunk's keys fit into its list");

__device__ float to_float(float value) {
  return value;
}
__device__ float to_float(__half value) {
  return __half2float(value);
}
__device__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// What stage 1 leaves of a chunk.
struct Chunk {
  Stats stats;
  int32_t count;  // of keys
};

struct Partials {
  unsigned num_chunks;  // per row
  int64_t list_size;    // keys per chunk
  Word* keys;           // [B, num_chunks, list_size]
  Chunk* chunks;        // [B, num_chunks]
};

Partials partials(const SelectCandidatesArgs& args, int64_t batch, void* workspace) {
  const int64_t num_chunks = (args.vocab_size + kChunk - 1) / kChunk, list_size = args.max_candidates + 1;
  Word* keys = static_cast<Word*>(workspace);
  Chunk* chunks = reinterpret_cast<Chunk*>(keys + batch * num_chunks * list_size);
  return {static_cast<unsigned>(num_chunks), list_size, keys, chunks};
}

// Tokens that candidate_top_k leaves.
__device__ int64_t candidate_limit(const SelectCandidatesArgs& args, int64_t row) {
  const int32_t top_k = args.candidate_top_k[row];
  return top_k > 0 && top_k < args.vocab_size ? top_k : args.vocab_size;
}

__device__ float plausible_from(float max, float log_alpha) {
  const float threshold = __fadd_rn(max, log_alpha);
  return threshold == -kInfinity ? -FLT_MAX : threshold;  // tokens of probability zero are never candidates
}

// Puts the keys of `visit(body)`, at most `capacity` of them, into `list`, in any order. If there are more, the first
// `wanted` in rank. Returns how many there are, found or wanted.
struct Found {
  int visited;
  int listed;
};

struct ListScratch {
  CutoffScratch cutoff;
  int visited;
  int listed;
};

template <typename Visit>
__device__ Found list_keys(const Visit& visit, Word* list, int capacity, int wanted, ListScratch& scratch) {
  if (threadIdx.x == 0) scratch.visited = scratch.listed = 0;
  __syncthreads();
  visit([&](Word key, Word) {
    const int place = atomicAdd(&scratch.visited, 1);
    if (place < capacity) list[place] = key;
  });
  __syncthreads();
  const int visited = scratch.visited;
  if (visited <= capacity) return {visited, visited};
  const Word cutoff = find_cutoff(visit, wanted, scratch.cutoff);
  visit([&](Word key, Word) {
    if (key >= cutoff) list[atomicAdd(&scratch.listed, 1)] = key;
  });
  __syncthreads();
  return {visited, wanted};
}

// --- stage 1 ---------------------------------------------------------------------------------------------------------

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Position in the chunk of a thread's i-th logit: a warp reads 512 bytes in a row.
template <typename T>
__device__ int position(int i) {
  constexpr int kPack = Pack<T>::kSize;
  return (i / kPack * kThreads + static_cast<int>(threadIdx.x)) * kPack + i % kPack;
}

// The thread's logits of a chunk of `size`, -inf past it. kAligned: rows begin at multiples of 16 bytes.
template <typename T, bool kAligned>
__device__ void load_logits(const T* chunk, int size, float (&z)[kPerThread]) {
  constexpr int kPack = Pack<T>::kSize;
  uint4 packs[kPerThread / kPack] = {};
#pragma unroll
  for (int i = 0; i < kPerThread; i += kPack) {
    const bool whole = kAligned && position<T>(i) + kPack <= size;
    if (whole) packs[i / kPack] = __ldcs(reinterpret_cast<const uint4*>(chunk + position<T>(i)));  // read only once
  }
#pragma unroll
  for (int i = 0; i < kPerThread; i += kPack) {
    const bool whole = kAligned && position<T>(i) + kPack <= size;
    if (whole) {
      Pack<T> pack;
      memcpy(&pack, &packs[i / kPack], sizeof(pack));
#pragma unroll
      for (int j = 0; j < kPack; ++j) z[i + j] = to_float(pack.values[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        z[i + j] = position<T>(i + j) < size ? to_float(chunk[position<T>(i + j)]) : -kInfinity;
      }
    }
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    reduce_chunks(const __grid_constant__ SelectCandidatesArgs args, const __grid_constant__ Partials partials) {
  __shared__ ReduceScratch reduce;
  __shared__ ListScratch listing;
  const int64_t row = blockIdx.x / partials.num_chunks, begin = int64_t{blockIdx.x % partials.num_chunks} * kChunk;
  const int64_t rest = args.vocab_size - begin;
  const T* chunk = static_cast<const T*>(args.logits) + row * args.logits_row_stride + begin;
  float z[kPerThread];
  load_logits<T, kAligned>(chunk, rest < kChunk ? static_cast<int>(rest) : kChunk, z);

  Stats stats = kNoLogits;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) stats.max = fmaxf(stats.max, z[i]);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) stats.sum_exp += __expf(z[i] - exp_base(stats.max));
  stats = reduce_block(stats, kNoLogits, Union(), reduce);

  const float threshold = plausible_from(stats.max, args.log_alpha[row]);
  unsigned plausible = 0;  // bit i: the thread's i-th logit
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) plausible |= static_cast<unsigned>(z[i] >= threshold) << i;
  // Reads the few again, so that registers are indexed by constants only.
  const auto visit = [&](const auto& body) {
    for (unsigned rest = plausible; rest != 0; rest &= rest - 1) {
      const int i = position<T>(__ffs(static_cast<int>(rest)) - 1);
      body(rank_key(to_float(chunk[i]), static_cast<int32_t>(begin) + i), Word{1});
    }
  };
  const int64_t limit = candidate_limit(args, row);
  const int wanted = static_cast<int>(limit < partials.list_size ? limit : partials.list_size);
  Word* list = partials.keys + static_cast<int64_t>(blockIdx.x) * partials.list_size;
  const Found found = list_keys(visit, list, static_cast<int>(partials.list_size), wanted, listing);
  if (threadIdx.x == 0) partials.chunks[blockIdx.x] = {stats, found.listed};
}

// --- stage 2 ---------------------------------------------------------------------------------------------------------

// Calls body(key, 1) for the calling thread's share of a row's keys that reach `threshold`.
template <typename Body>
__device__ void visit_plausible(const Partials& partials, int64_t row, float threshold, const Body& body) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = kThreads / 32;
  const Chunk* chunks = partials.chunks + row * partials.num_chunks;
  const Word* keys = partials.keys + row * partials.num_chunks * partials.list_size;
  // A warp has every eighth chunk; its lanes look at 32 of them at a time and then share each that counts.
  for (unsigned first = warp; first < partials.num_chunks; first += num_warps * 32) {
    const unsigned mine = first + lane * num_warps;
    const bool counts = mine < partials.num_chunks && chunks[mine].stats.max >= threshold;
    const int count = counts ? chunks[mine].count : 0;
    for (unsigned rest = __ballot_sync(kAllLanes, counts); rest != 0; rest &= rest - 1) {
      const int source = __ffs(static_cast<int>(rest)) - 1;
      const Word* list = keys + (first + source * num_warps) * partials.list_size;
      const int size = __shfl_sync(kAllLanes, count, source);
      for (int i = static_cast<int>(lane); i < size; i += 32) {
        if (key_logit(list[i]) >= threshold) body(list[i], Word{1});
      }
    }
  }
}

__device__ int power_of_two_from(int value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    merge_chunks(const __grid_constant__ SelectCandidatesArgs args, const __grid_constant__ Partials partials) {
  __shared__ ReduceScratch reduce;
  __shared__ ListScratch listing;
  __shared__ Word keys[kMaxCandidates];
  const int64_t row = blockIdx.x;
  Stats stats = kNoLogits;
  for (unsigned i = threadIdx.x; i < partials.num_chunks; i += kThreads) {
    stats = Union()(stats, partials.chunks[row * partials.num_chunks + i].stats);
  }
  stats = reduce_block(stats, kNoLogits, Union(), reduce);
  const bool usable = stats.usable();

  const float threshold = plausible_from(stats.max, args.log_alpha[row]);
  const auto visit = [&](const auto& body) {
    if (usable) visit_plausible(partials, row, threshold, body);
  };
  const int64_t limit = candidate_limit(args, row);
  const int capacity = static_cast<int>(limit < args.max_candidates ? limit : args.max_candidates);
  const Found found = list_keys(visit, keys, kMaxCandidates, capacity, listing);

  const int size = power_of_two_from(found.listed);
  for (int i = found.listed + static_cast<int>(threadIdx.x); i < size; i += kThreads) keys[i] = 0;  // sorts last
  sort_descending(keys, size);

  const int count = found.listed < capacity ? found.listed : capacity;
  const T* logits = static_cast<const T*>(args.logits) + row * args.logits_row_stride;
  for (int64_t i = threadIdx.x; i < args.max_candidates; i += kThreads) {
    const int32_t id = i < count ? key_id(keys[i]) : -1;
    float logit = i < count ? key_logit(keys[i]) : -kInfinity;
    if (logit == 0.0f) logit = to_float(logits[id]);  // keys do not know the sign of zero
    args.ids[row * args.max_candidates + i] = id;
    args.candidate_logits[row * args.max_candidates + i] = logit;
  }
  if (threadIdx.x != 0) return;
  args.count[row] = count;
  args.logsumexp[row] = usable ? stats.logsumexp() : __int_as_float(0x7fc00000);
  args.cut[row] = found.visited > args.max_candidates && limit > args.max_candidates;
}

template <typename T>
void queue(const SelectCandidatesArgs& args, int64_t batch, const Partials& partials, void* stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(args.logits) % 16 == 0 &&
                       (batch == 1 || args.logits_row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0);
  launch(aligned ? reduce_chunks<T, true> : reduce_chunks<T, false>, batch * partials.num_chunks, kThreads, stream,
         args, partials);
  launch(merge_chunks<T>, batch, kThreads, stream, args, partials);
}

}  // namespace

int64_t select_candidates_workspace(const SelectCandidatesArgs& args, int64_t batch) {
  const Partials sizes = partials(args, batch, nullptr);
  return batch * sizes.num_chunks *
         (sizes.list_size * static_cast<int64_t>(sizeof(Word)) + static_cast<int64_t>(sizeof(Chunk)));
}

void select_candidates(const SelectCandidatesArgs& args, int64_t batch, void* workspace, void* stream) {
  const Partials lists = partials(args, batch, workspace);
  if (args.dtype == DType::kFloat32) queue<float>(args, batch, lists, stream);
  if (args.dtype == DType::kFloat16) queue<__half>(args, batch, lists, stream);
  if (args.dtype == DType::kBFloat16) queue<__nv_bfloat16>(args, batch, lists, stream);
}

}  // namespace cuda
}  // namespace llm2_fast
