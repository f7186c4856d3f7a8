// A whole block for a few tokens: norm, attention over pages, norm, gated feed-forward net.

#pragma once

#include "attention.h"

template <class W>
struct Block {
    const W *norm1, *q, *k, *v, *o, *norm2, *gate, *up, *down;
    int64_t channels, hidden;
    float epsilon;
};

template <class W>
struct Pages {
    W *k, *v;
    const int64_t* where;  // entry of each token, -1 for one that writes nothing; null: none does
    Lists lists;
};

struct Turns {
    const float *cos, *sin;  // of each token [tokens, dim], the sine of the first half with a minus; null: no rotation
};

template <class X, class W, class F>
static inline void normed(const X* x, const W* weight, F* y, int64_t channels, float epsilon) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < channels; i++) square += widen(x[i]) * widen(x[i]);
    float inverse = 1 / std::sqrt(square / channels + epsilon);
    for (int64_t i = 0; i < channels; i++) narrow(widen(x[i]) * inverse * widen(weight[i]), y + i);
}

template <class W>
static inline void turned(const float* x, W* y, int64_t dim, const Turns& turns, int64_t token) {
    if (turns.cos == nullptr) {
        for (int64_t i = 0; i < dim; i++) narrow(x[i], y + i);
        return;
    }
    const float *cos = turns.cos + token * dim, *sin = turns.sin + token * dim;
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        narrow(x[i] * cos[i] + x[i + half] * sin[i], y + i);
        narrow(x[i + half] * cos[i + half] + x[i] * sin[i + half], y + i + half);
    }
}

static inline float silu(float x) {
    float power = exponential(-std::fabs(x));
    return x * (x < 0 ? power : 1.0f) / (1 + power);
}

// Within a parallel region: each output of each row to `finish(row, output, sum)`.
template <class W, class Finish>
static inline void product(const Factor<W>* x, const W* w, int64_t rows, int64_t inner, int64_t outer, Room& room,
                           const Finish& finish) {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks_of(outer); block++) {
        const float* totals = outputs(x, w, rows, inner, outer, block, room.weights, room.totals);
        int64_t first = block * OUTPUTS, count = std::min<int64_t>(OUTPUTS, outer - first);
        for (int64_t t = 0; t < rows; t++)
            for (int64_t o = 0; o < count; o++) finish(t, first + o, totals[t * OUTPUTS + o]);
    }
}

// x [tokens, channels] -> y; keys and values go to the pages.
template <class W>
static void block(const W* x, W* y, int64_t tokens, const Block<W>& own, const Pages<W>& pages, const Heads& heads,
                  const Turns& turns, float scale) {
    using F = Factor<W>;
    const int64_t channels = own.channels, dim = heads.dim, hidden = own.hidden;
    const int64_t queries = heads.kv_heads * heads.group * dim, keys = heads.kv_heads * dim;
    const int64_t made = queries + (pages.where == nullptr ? 0 : 2 * keys);
    std::vector<F> inputs(tokens * std::max(channels, queries)), inner(tokens * hidden);
    std::vector<float> heads_of(tokens * made), stream(tokens * channels);
    std::vector<W> turned_queries(tokens * queries);
#pragma omp parallel
    {
        Room room;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            normed(x + t * channels, own.norm1, inputs.data() + t * channels, channels, own.epsilon);
        auto keep = [&](int64_t start) {
            return [&, start](int64_t t, int64_t o, float sum) { heads_of[t * made + start + o] = sum; };
        };
        product<W>(inputs.data(), own.q, tokens, channels, queries, room, keep(0));
        if (pages.where != nullptr) {
            product<W>(inputs.data(), own.k, tokens, channels, keys, room, keep(queries));
            product<W>(inputs.data(), own.v, tokens, channels, keys, room, keep(queries + keys));
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            const float* made_of = heads_of.data() + t * made;
            for (int64_t at = 0; at < queries; at += dim)
                turned(made_of + at, turned_queries.data() + t * queries + at, dim, turns, t);
            if (pages.where == nullptr || pages.where[t] < 0) continue;
            for (int64_t at = 0; at < keys; at += dim)
                turned(made_of + queries + at, pages.k + pages.where[t] * keys + at, dim, turns, t);
            for (int64_t i = 0; i < keys; i++) narrow(made_of[queries + keys + i], pages.v + pages.where[t] * keys + i);
        }
        attend<W, float>(turned_queries.data(), pages.k, pages.v, inputs.data(), pages.lists, tokens, heads, scale);
        product<W>(inputs.data(), own.o, tokens, queries, channels, room, [&](int64_t t, int64_t o, float sum) {
            stream[t * channels + o] = widen(x[t * channels + o]) + sum;
        });
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            normed(stream.data() + t * channels, own.norm2, inputs.data() + t * channels, channels, own.epsilon);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks_of(hidden); block++) {
            const float* gate = outputs(inputs.data(), own.gate, tokens, channels, hidden, block, room.weights, room.totals);
            const float* up = outputs(inputs.data(), own.up, tokens, channels, hidden, block, room.weights, room.more);
            int64_t first = block * OUTPUTS, count = std::min<int64_t>(OUTPUTS, hidden - first);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t o = 0; o < count; o++)
                    narrow(silu(gate[t * OUTPUTS + o]) * up[t * OUTPUTS + o], inner.data() + t * hidden + first + o);
        }
        product<W>(inner.data(), own.down, tokens, hidden, channels, room, [&](int64_t t, int64_t o, float sum) {
            narrow(stream[t * channels + o] + sum, y + t * channels + o);
        });
    }
}
