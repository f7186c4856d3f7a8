// Products of a few rows with a weight matrix.
//
// Every number of an output is summed by one thread in an order that depends on the inner size alone, so that results
// depend neither on the number of threads nor on the other rows.

#pragma once

#include "numbers.h"

constexpr int OUTPUTS = 4;

// totals[t * step + o] = x[t] . w[o] for T rows of x and four rows of w; AHEAD: the four rows behind these come next.
template <int T, bool AHEAD = false>
static inline void tile(const float* x, int64_t stride, const float* const* w, int64_t inner, float* totals,
                        int64_t step = OUTPUTS) {
    Floats parts[T][OUTPUTS] = {};
    int64_t i = 0;
    for (; i + LANES <= inner; i += LANES) {
        Floats weights[OUTPUTS];
        for (int o = 0; o < OUTPUTS; o++) weights[o] = load(w[o] + i);
        if (AHEAD)
            for (int o = 0; o < OUTPUTS; o++) __builtin_prefetch(w[o] + i + OUTPUTS * inner);
        for (int t = 0; t < T; t++) {
            Floats row = load(x + t * stride + i);
            for (int o = 0; o < OUTPUTS; o++) parts[t][o] = fused(row, weights[o], parts[t][o]);
        }
    }
    for (int t = 0; t < T; t++) {
        Quad total = sums(parts[t][0], parts[t][1], parts[t][2], parts[t][3]);
        for (int o = 0; o < OUTPUTS; o++) {
            float sum = total[o];
            for (int64_t j = i; j < inner; j++) sum = std::fma(x[t * stride + j], w[o][j], sum);
            totals[t * step + o] = sum;
        }
    }
}

#if defined(__AVX512BF16__)
template <int T, bool AHEAD = false>
static inline void tile(const Bfloat* x, int64_t stride, const Bfloat* const* w, int64_t inner, float* totals,
                        int64_t step = OUTPUTS) {
    __m512 parts[T][OUTPUTS];
    for (int t = 0; t < T; t++)
        for (int o = 0; o < OUTPUTS; o++) parts[t][o] = _mm512_setzero_ps();
    auto add = [&](int64_t i, auto load) __attribute__((always_inline)) {
        __m512bh weights[OUTPUTS];
        for (int o = 0; o < OUTPUTS; o++) weights[o] = load(w[o] + i);
        if (AHEAD)
            for (int o = 0; o < OUTPUTS; o++) __builtin_prefetch(w[o] + i + OUTPUTS * inner);
        for (int t = 0; t < T; t++) {
            __m512bh row = load(x + t * stride + i);
            for (int o = 0; o < OUTPUTS; o++) parts[t][o] = _mm512_dpbf16_ps(parts[t][o], row, weights[o]);
        }
    };
    int64_t i = 0;
    for (; i + 32 <= inner; i += 32) add(i, [](const Bfloat* at) { return (__m512bh)_mm512_loadu_si512(at); });
    if (i < inner) {
        __mmask32 rest = (__mmask32(1) << (inner - i)) - 1;
        add(i, [rest](const Bfloat* at) { return (__m512bh)_mm512_maskz_loadu_epi16(rest, at); });
    }
    for (int t = 0; t < T; t++) {
        Quad total = sums((Floats)parts[t][0], (Floats)parts[t][1], (Floats)parts[t][2], (Floats)parts[t][3]);
        std::memcpy(totals + t * step, &total, sizeof total);
    }
}
#endif

// `tile` for up to T rows.
template <int T, bool AHEAD, class F>
static inline void rest(const F* x, int64_t rows, int64_t stride, const F* const* w, int64_t inner, float* totals,
                        int64_t step) {
    if constexpr (T > 0) {
        if (rows == T) return tile<T, AHEAD>(x, stride, w, inner, totals, step);
        rest<T - 1, AHEAD>(x, rows, stride, w, inner, totals, step);
    }
}

// `tile` for any number of rows.
template <bool AHEAD, class F>
static inline void strip(const F* x, int64_t rows, int64_t stride, const F* const* w, int64_t inner, float* totals,
                         int64_t step) {
    int64_t t = std::min<int64_t>(rows, TOKENS);
    rest<TOKENS, AHEAD>(x, t, stride, w, inner, totals, step);
    for (; t + TOKENS <= rows; t += TOKENS)
        tile<TOKENS>(x + t * stride, stride, w, inner, totals + t * step, step);
    rest<TOKENS - 1, false>(x + t * stride, rows - t, stride, w, inner, totals + t * step, step);
}

// Numbers as factors of products, in `room` where they are not that already.
template <class T>
static inline const Factor<T>* factors(const T* x, int64_t count, std::vector<float>& room) {
    if constexpr (std::is_same_v<Factor<T>, T>) {
        return x;
    } else {
        if ((int64_t)room.size() < count) room.resize(count);
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) store(load(x + i), room.data() + i);
        for (; i < count; i++) room[i] = widen(x[i]);
        return room.data();
    }
}

static inline int64_t blocks_of(int64_t outer) { return (outer + OUTPUTS - 1) / OUTPUTS; }

// What a thread computes a block of outputs in.
struct Room {
    std::vector<float> weights, totals, more;
};

// Four outputs of all rows: totals[t][o] = x[t] . w[4 block + o]. Outputs behind the last are those of the last again.
template <class W>
static inline const float* outputs(const Factor<W>* x, const W* w, int64_t rows, int64_t inner, int64_t outer,
                                   int64_t block, std::vector<float>& room, std::vector<float>& totals) {
    int64_t first = block * OUTPUTS, count = std::min<int64_t>(OUTPUTS, outer - first);
    const Factor<W>* weights = factors(w + first * inner, count * inner, room);
    const Factor<W>* each[OUTPUTS];
    for (int64_t o = 0; o < OUTPUTS; o++) each[o] = weights + std::min(o, count - 1) * inner;
    if ((int64_t)totals.size() < rows * OUTPUTS) totals.resize(rows * OUTPUTS);
    // Into the second cache as a whole, and into the first as the products go along: a processor foresees neither.
    const char* next = (const char*)(w + (first + OUTPUTS) * inner);
    for (int64_t at = 0; at < OUTPUTS * inner * int64_t(sizeof(W)); at += 64) __builtin_prefetch(next + at, 0, 2);
    strip<true>(x, rows, inner, each, inner, totals.data(), OUTPUTS);
    return totals.data();
}

template <class W>
static void linear(const W* x, const W* w, W* y, int64_t rows, int64_t inner, int64_t outer) {
    std::vector<float> inputs;
    const Factor<W>* from = factors(x, rows * inner, inputs);
#pragma omp parallel if (rows * inner * outer > 65536)
    {
        Room room;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks_of(outer); block++) {
            const float* totals = outputs(from, w, rows, inner, outer, block, room.weights, room.totals);
            int64_t first = block * OUTPUTS, count = std::min<int64_t>(OUTPUTS, outer - first);
            for (int64_t t = 0; t < rows; t++)
                for (int64_t o = 0; o < count; o++) narrow(totals[t * OUTPUTS + o], y + t * outer + first + o);
        }
    }
}
