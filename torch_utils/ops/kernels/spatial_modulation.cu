// SPDX-License-Identifier: Apache-2.0
// Maps times bilinearly enlarged style grids, and the transpose of that with respect to the grid.
//   modulate:  out[n,c,y,x] = a[n,c,y,x] * sum over grids of (the grid at (y,x))[n,c]
//   project:   out[n,c,i,x] = sum_y weight[y,i] * a[n,c,y,x] * b[n,c,y,x]        (one axis of the transpose)
// Channels-first: a thread handles VEC neighbours of a row. Channels-last: VEC neighbouring channels, and in
// modulate RUN pixels of a row, so that a cell of the grid is read once for all of them. Traffic: modulate reads a
// once and writes out once; project reads a and b twice (two rows of the grid meet in every pixel, the second
// reading from the cache) and writes grid-height/height of a map. The grids are small and stay in the cache.
#include "scalar.cuh"

// The place of pixel `i` of `size` among `cells` grid points: between `low` and `high`, at `t` from low to high.
template <class F> struct Place { int low, high; F t; };

template <class F> __device__ __forceinline__ Place<F> place(long long i, long long size, long long cells)
{
    F at = (F(i) + F(0.5)) * (F(cells) / F(size)) - F(0.5);
    at = at < 0 ? F(0) : at;  // clamped borders
    Place<F> result;
    result.low = (int)at;
    if (result.low > (int)cells - 1)
        result.low = (int)cells - 1;
    result.high = result.low + 1 < (int)cells ? result.low + 1 : result.low;
    result.t = at - F(result.low);
    return result;
}

// One column of a grid, interpolated between two rows, for N channels that are neighbours in memory.
template <int N, class F, class I>
__device__ __forceinline__ void column(F (&values)[N], const F* grid, I width, I stride, Place<F> y, int x)
{
    const int wide = N * (int)sizeof(F) > 16 ? 16 / (int)sizeof(F) : N;  // values in one access
#pragma unroll
    for (int i = 0; i < N; i += wide) {
        F low[wide], high[wide];
        load(low, grid + ((I)y.low * width + x) * stride + i);
        load(high, grid + ((I)y.high * width + x) * stride + i);
#pragma unroll
        for (int j = 0; j < wide; j++)
            values[i + j] = low[j] + y.t * (high[j] - low[j]);
    }
}

// style[i] += the grid at pixels x .. x+N-1 of row y (channels-first), plane by plane.
template <int N, class F, class I>
__device__ __forceinline__ void add_row(
    F (&style)[N], const F* plane, I gh, I gw, long long y, long long x, long long height, long long width)
{
    const Place<F> row = place<F>(y, height, gh);
    F left[1], right[1];
    int cell = -1;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const Place<F> at = place<F>(x + i, width, gw);
        if (at.low != cell) {
            cell = at.low;
            column(left, plane, gw, I(1), row, at.low);
            column(right, plane, gw, I(1), row, at.high);
        }
        style[i] += left[0] + at.t * (right[0] - left[0]);
    }
}

#ifdef MODULATE
extern "C" __global__ void __launch_bounds__(256) modulate(
    const SCALAR* a, SCALAR* out, const Compute<SCALAR>::type* first, const Compute<SCALAR>::type* second,
    long long samples, long long channels, long long height, long long width, long long gh1, long long gw1,
    long long gh2, long long gw2)
{
    typedef Compute<SCALAR>::type F;
    INDEX id = (INDEX)blockIdx.x * blockDim.x + threadIdx.x;
#if CHANNELS_LAST
    const INDEX packs = (INDEX)channels / VEC, runs = ((INDEX)width + RUN - 1) / RUN;
    const INDEX c = id % packs * VEC;
    id /= packs;
    const INDEX x0 = id % runs * RUN;
    id /= runs;
    const INDEX y = id % (INDEX)height, n = id / (INDEX)height;
    if (n >= (INDEX)samples)
        return;
    F style[RUN][VEC] = {};
#pragma unroll
    for (int g = 0; g < GRIDS; g++) {
        const INDEX gh = (INDEX)(g ? gh2 : gh1), gw = (INDEX)(g ? gw2 : gw1);
        const F* grid = (g ? second : first) + n * gh * gw * (INDEX)channels + c;
        const Place<F> row = place<F>(y, height, gh);
        F left[VEC], right[VEC];
        int cell = -1;
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            const Place<F> at = place<F>(x0 + i, width, gw);
            if (at.low != cell) {
                cell = at.low;
                column(left, grid, gw, (INDEX)channels, row, at.low);
                column(right, grid, gw, (INDEX)channels, row, at.high);
            }
#pragma unroll
            for (int v = 0; v < VEC; v++)
                style[i][v] += left[v] + at.t * (right[v] - left[v]);
        }
    }
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        if (x0 + i >= (INDEX)width)
            break;
        const INDEX at = ((n * (INDEX)height + y) * (INDEX)width + x0 + i) * (INDEX)channels + c;
        F values[VEC];
        load(values, a + at);
#pragma unroll
        for (int v = 0; v < VEC; v++)
            values[v] *= style[i][v];
        store(out + at, values);
    }
#else
    const INDEX packs = (INDEX)width / VEC;
    const INDEX x = id % packs * VEC;
    id /= packs;
    const INDEX y = id % (INDEX)height, plane = id / (INDEX)height;
    if (plane >= (INDEX)(samples * channels))
        return;
    F style[VEC] = {}, values[VEC];
    add_row(style, first + plane * (INDEX)(gh1 * gw1), (INDEX)gh1, (INDEX)gw1, y, x, height, width);
    if (GRIDS > 1)
        add_row(style, second + plane * (INDEX)(gh2 * gw2), (INDEX)gh2, (INDEX)gw2, y, x, height, width);
    const INDEX at = (plane * (INDEX)height + y) * (INDEX)width + x;
    load(values, a + at);
#pragma unroll
    for (int v = 0; v < VEC; v++)
        values[v] *= style[v];
    store(out + at, values);
#endif
}
#endif

#ifdef PROJECT
// `inner` neighbours in memory share a row: the row's width, times the channels where those come last; `outer` is
// what lies beyond the rows: samples, times the channels where those come first. out: [outer, cells, inner].
extern "C" __global__ void __launch_bounds__(256) project(
    const SCALAR* a, const SCALAR* b, Compute<SCALAR>::type* out, long long outer, long long height, long long inner,
    long long cells)
{
    typedef Compute<SCALAR>::type F;
    INDEX id = (INDEX)blockIdx.x * blockDim.x + threadIdx.x;
    const INDEX packs = (INDEX)inner / VEC;
    const INDEX x = id % packs * VEC;
    id /= packs;
    const INDEX cell = id % (INDEX)cells, n = id / (INDEX)cells;
    if (n >= (INDEX)outer)
        return;
    // The rows between the grid's rows before and after this one, and one more for rounding.
    INDEX begin = cell == 0 ? 0 : ((2 * cell - 1) * (INDEX)height) / (2 * (INDEX)cells);
    INDEX end = cell + 1 == (INDEX)cells ? (INDEX)height : ((2 * cell + 3) * (INDEX)height) / (2 * (INDEX)cells) + 1;
    begin = begin > 0 ? begin - 1 : 0;
    end = end < (INDEX)height ? end : (INDEX)height;
    F sums[VEC] = {};
    for (INDEX y = begin; y < end; y++) {
        const Place<F> at = place<F>(y, height, cells);
        const F weight = (at.low == (int)cell ? F(1) - at.t : F(0)) + (at.high == (int)cell ? at.t : F(0));
        const INDEX position = (n * (INDEX)height + y) * (INDEX)inner + x;
        F left[VEC], right[VEC];
        load(left, a + position);
        load(right, b + position);
#pragma unroll
        for (int v = 0; v < VEC; v++)
            sums[v] += weight * (left[v] * right[v]);
    }
    store(out + (n * (INDEX)cells + cell) * (INDEX)inner + x, sums);
}
#endif
