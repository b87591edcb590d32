// Makes the chosen branch of each sequence the last token of its slot: a block per sequence and layer copies its keys
// and values, and a second kernel, which must not begin earlier, counts the position.
#include "launch.cuh"
#include "ops.h"

namespace llm2_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Copies rows of `size` units that are `stride` units apart at the target and contiguous at the source.
template <typename Unit>
__device__ void copy_rows(const void* source, void* target, int64_t rows, int64_t size, int64_t stride) {
  for (int64_t i = threadIdx.x; i < rows * size; i += kThreads) {
    static_cast<Unit*>(target)[i / size * stride + i % size] = static_cast<const Unit*>(source)[i];
  }
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) copy_branches(const __grid_constant__ CommitArgs args) {
  const int64_t b = blockIdx.x / args.num_layers, layer = blockIdx.x % args.num_layers;
  if (args.index[b] < 0) return;
  const int64_t row = int64_t{args.first_row[b]} + args.index[b], slot = args.slots[b], position = args.lengths[slot];
  const int64_t block = args.block_table[slot * args.block_table_row_stride + position / args.block_size];
  const int64_t units_per_16_bytes = 16 / sizeof(Unit), element = args.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t head = args.head_dim * element * units_per_16_bytes / 16;  // in units
  const int64_t hidden = args.hidden_size * element * units_per_16_bytes / 16;
  const int64_t source = (layer * args.num_rows + row) * args.num_kv_heads * head;
  const int64_t target =
      ((layer * args.num_blocks + block) * args.num_kv_heads * args.block_size + position % args.block_size) * head;
  const auto units = [](const void* data, int64_t offset) { return static_cast<const Unit*>(data) + offset; };
  const auto units_of = [](void* data, int64_t offset) { return static_cast<Unit*>(data) + offset; };
  copy_rows<Unit>(units(args.own_key, source), units_of(args.keys, target), args.num_kv_heads, head,
                  args.block_size * head);
  copy_rows<Unit>(units(args.own_value, source), units_of(args.values, target), args.num_kv_heads, head,
                  args.block_size * head);
  if (layer > 0 || args.hidden == nullptr) return;
  copy_rows<Unit>(units(args.hidden, row * hidden), units_of(args.hidden_states, slot * hidden), 1, hidden, hidden);
}

__global__ void __launch_bounds__(kThreads) count_positions(const __grid_constant__ CommitArgs args, int64_t batch) {
  const int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (b < batch && args.index[b] >= 0) ++args.lengths[args.slots[b]];
}

// Whether all rows that are copied begin at multiples of 16 bytes.
bool aligned(const CommitArgs& args) {
  const int64_t element = size_of(args.dtype);
  uintptr_t bits = static_cast<uintptr_t>(args.head_dim * element);
  for (const void* data :
       {args.own_key, args.own_value, const_cast<const void*>(args.keys), const_cast<const void*>(args.values)}) {
    bits |= reinterpret_cast<uintptr_t>(data);
  }
  if (args.hidden != nullptr) {
    bits |= static_cast<uintptr_t>(args.hidden_size * element) | reinterpret_cast<uintptr_t>(args.hidden) |
            reinterpret_cast<uintptr_t>(args.hidden_states);
  }
  return bits % 16 == 0;
}

}  // namespace

void commit(const CommitArgs& args, int64_t batch, void* stream) {
  launch(aligned(args) ? copy_branches<uint4> : copy_branches<uint16_t>, batch * args.num_layers, kThreads, stream,
         args);
  launch(count_positions, (batch + kThreads - 1) / kThreads, kThreads, stream, args, batch);
}

}  // namespace cuda
}  // namespace llm2_fast
