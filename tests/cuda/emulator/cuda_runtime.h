// As much of CUDA as the kernels of llm2_fast use, on the CPU, so that their logic is tested where no GPU is: the .cu
// files are compiled as C++ with this folder before CUDA's own headers.
//
// Every thread of a block is a fiber that runs until it waits for others. The order of threads, warps and blocks is
// random, and a warp runs as far ahead of the others as barriers let it, so a missing barrier shows as a wrong result.
// Threads that wait for each other, or for one that has returned, end the program. Time, memory spaces and the memory
// model are not emulated.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

// Runs `thread` as each thread of each block.
void run(unsigned num_blocks, unsigned block_size, const std::function<void()>& thread);

// Waits for all threads of the block.
void wait_for_block();

// Gives 8 bytes to the other lanes of the warp and returns, after a wait, those of a lane.
uint64_t exchange(unsigned lanes, uint64_t bytes, unsigned source);

}  // namespace emulator

extern dim3 threadIdx, blockIdx, blockDim;

// --- threads ---------------------------------------------------------------------------------------------------------

inline void __syncthreads() {
  emulator::wait_for_block();
}

template <typename T>
T __shfl_sync(unsigned lanes, T value, int source) {
  uint64_t bytes = 0;
  static_assert(sizeof(T) <= sizeof(bytes), "a value fits into a slot");
  std::memcpy(&bytes, &value, sizeof(T));
  bytes = emulator::exchange(lanes, bytes, static_cast<unsigned>(source));
  std::memcpy(&value, &bytes, sizeof(T));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  return __shfl_sync(lanes, value, static_cast<int>(threadIdx.x % 32) ^ mask);
}

template <typename T>
T __shfl_up_sync(unsigned lanes, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(lanes, value, static_cast<int>(lane >= delta ? lane - delta : lane));
}

inline unsigned __ballot_sync(unsigned lanes, int predicate) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned vote = __shfl_sync(lanes, predicate != 0 ? 1u : 0u, static_cast<int>(lane));
    if ((lanes >> lane & 1) != 0) votes |= vote << lane;
  }
  return votes;
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

template <typename To, typename From>
To emulator_bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "of one size");
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline unsigned __float_as_uint(float value) {
  return emulator_bits<unsigned>(value);
}
inline float __uint_as_float(unsigned bits) {
  return emulator_bits<float>(bits);
}
inline float __int_as_float(int bits) {
  return emulator_bits<float>(bits);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __expf(float x) {
  return std::exp(x);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline uint4 __ldcs(const uint4* address) {
  return *address;
}
using std::isnan;

// --- runtime ---------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyDefault };
using cudaStream_t = struct EmulatedStream*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::run(config->gridDim.x, config->blockDim.x, [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "out of memory";
}
inline cudaError_t cudaMalloc(void** pointer, size_t size) {
  *pointer = std::malloc(size);
  return *pointer == nullptr && size > 0 ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
