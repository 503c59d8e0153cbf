// SPDX-License-Identifier: Apache-2.0
// Number types and wide memory accesses, without any header, so that every CUDA compiler takes it as it is.
// Values are stored as T and computed as Compute<T>::type: float, for double double.
#pragma once

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

template <class T> struct Compute { typedef float type; };
template <> struct Compute<double> { typedef double type; };

#ifndef FLOAT16_CONVERSIONS  // compilers without PTX bring their own two functions
__device__ __forceinline__ float float_from_float16(unsigned short bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned short float16_from_float(float value)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(float16 value) { return float_from_float16(value.bits); }
__device__ __forceinline__ float widen(bfloat16 value)
{
    return __uint_as_float((unsigned int)value.bits << 16);
}

// Rounds to nearest, ties to even.
template <class T> __device__ __forceinline__ T narrow(typename Compute<T>::type value) { return value; }
template <> __device__ __forceinline__ float16 narrow<float16>(float value)
{
    float16 result = {float16_from_float(value)};
    return result;
}
template <> __device__ __forceinline__ bfloat16 narrow<bfloat16>(float value)
{
    const unsigned int bits = __float_as_uint(value);
    const unsigned int rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    bfloat16 result = {(unsigned short)(nan ? 0x7fffu : rounded)};
    return result;
}

// N neighbours in memory, moved at once.
template <class T, int N> struct alignas(sizeof(T) * N) Pack { T values[N]; };

// values[i] = source[i], zero from `valid` on. `source` is aligned to N elements if valid == N > 1.
template <int N, class T>
__device__ __forceinline__ void load(typename Compute<T>::type (&values)[N], const T* source, int valid = N)
{
    if (valid == N) {
        const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(source);
#pragma unroll
        for (int i = 0; i < N; i++)
            values[i] = widen(pack.values[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        values[i] = i < valid ? widen(source[i]) : typename Compute<T>::type(0);
}

// target[i] = values[i] for the first `valid` of them.
template <int N, class T>
__device__ __forceinline__ void store(T* target, const typename Compute<T>::type (&values)[N], int valid = N)
{
    if (valid == N) {
        Pack<T, N> pack;
#pragma unroll
        for (int i = 0; i < N; i++)
            pack.values[i] = narrow<T>(values[i]);
        *reinterpret_cast<Pack<T, N>*>(target) = pack;
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < valid)
            target[i] = narrow<T>(values[i]);
}
