// SPDX-License-Identifier: Apache-2.0
// Lets a host compiler take the CUDA kernels, one thread after the other, so that their arithmetic and indexing can
// be tested without a GPU. KERNEL_FILE and KERNEL name the source and the kernel.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)

using std::exp;
using std::expm1;
using std::fabs;
using std::log1p;
using std::tanh;

struct Index { unsigned int x, y, z; };
static Index blockIdx, blockDim, threadIdx;
static int host_act;  // stands for the macro ACT: one build serves all activations

template <class To, class From> static To reinterpret(From value)
{
    static_assert(sizeof(To) == sizeof(From), "");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}
static inline float __uint_as_float(unsigned int bits) { return reinterpret<float>(bits); }
static inline unsigned int __float_as_uint(float value) { return reinterpret<unsigned int>(value); }

#define FLOAT16_CONVERSIONS
static inline float float_from_float16(unsigned short bits) { return reinterpret<_Float16>(bits); }
static inline unsigned short float16_from_float(float value) { return reinterpret<unsigned short>((_Float16)value); }

#include KERNEL_FILE

template <class... A, size_t... I> void call(void (*kernel)(A...), void** params, std::index_sequence<I...>)
{
    kernel(*static_cast<std::remove_const_t<A>*>(params[I])...);
}

template <class... A> void call(void (*kernel)(A...), void** params)
{
    call(kernel, params, std::index_sequence_for<A...>());
}

// As cuLaunchKernel, for the one kernel in here.
extern "C" void launch(unsigned int blocks, unsigned int threads, void** params, int act)
{
    host_act = act;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            call(KERNEL, params);
}
