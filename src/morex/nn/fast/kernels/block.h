// Whole blocks, one after another, for a few tokens: norm, attention over pages, norm, gated feed-forward net.

#pragma once

#include "attention.h"

struct Shape {
    int64_t tokens, channels, hidden;
    Heads heads;
    float scale;
};

// Rotation [places, dim], the sine of the first half with a minus, and the place of each token in it; null: there is
// none, and token i stands at place i.
struct Turns {
    const float *cos, *sin;
    const int64_t* places;
};

// What a block brings: weights, where its keys and values stand, and how its attention sees them.
template <class W>
struct Block {
    const W *norm1, *q, *k, *v, *o, *norm2, *gate, *up, *down;
    float epsilon;
    const int64_t* where;  // entry of each token, -1 for one that writes nothing; null: none does
    Lists lists;
    Turns turns;
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
    const int64_t place = turns.places == nullptr ? token : turns.places[token];
    const float *cos = turns.cos + place * dim, *sin = turns.sin + place * dim;
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

// x [rows, channels] -> norm of each row.
template <class W>
static void norm(const W* x, const W* weight, W* y, int64_t rows, int64_t channels, float epsilon) {
    for (int64_t t = 0; t < rows; t++) normed(x + t * channels, weight, y + t * channels, channels, epsilon);
}

// x [rows, channels] -> queries, turned keys and values, one after another: y [rows, outer] of each that has a weight.
template <class W>
static void project(const W* x, const W* const* weights, W* y, int64_t rows, int64_t channels, const int64_t* outer,
                    int64_t dim, const Turns& turns) {
    std::vector<float> inputs, made(rows * std::max({outer[0], outer[1], outer[2]}));
    const Factor<W>* from = factors(x, rows * channels, inputs);
#pragma omp parallel if (rows * channels * (outer[0] + outer[1] + outer[2]) > 65536)
    {
        Room room;
        W* out = y;
        for (int part = 0; part < 3; out += rows * outer[part++]) {
            if (weights[part] == nullptr) continue;
            product<W>(from, weights[part], rows, channels, outer[part], room,
                       [&](int64_t t, int64_t o, float sum) { made[t * outer[part] + o] = sum; });
#pragma omp for schedule(static)
            for (int64_t t = 0; t < rows; t++)
                for (int64_t i = t * outer[part]; i < (t + 1) * outer[part]; i += dim)
                    if (part < 2) turned(made.data() + i, out + i, dim, turns, t);
                    else for (int64_t j = i; j < i + dim; j++) narrow(made[j], out + j);
        }
    }
}

template <class W>
struct Scratch {
    std::vector<float> stream, made;    // the residual stream; queries, keys and values before they turn
    std::vector<W> queries;
    std::vector<Factor<W>> inputs, inner;  // of the products
};

// Within a parallel region: a block on the residual stream; keys and values go to the pages.
template <class W>
static void block(const Block<W>& own, const Shape& shape, W* k, W* v, Scratch<W>& at, Room& room) {
    const int64_t tokens = shape.tokens, channels = shape.channels, hidden = shape.hidden, dim = shape.heads.dim;
    const int64_t keys = shape.heads.kv_heads * dim, queries = keys * shape.heads.group, width = queries + 2 * keys;
    float* stream = at.stream.data();
    Factor<W>*inputs = at.inputs.data(), *inner = at.inner.data();
    auto norm = [&](const W* weight) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            normed(stream + t * channels, weight, inputs + t * channels, channels, own.epsilon);
    };
    auto add = [&](int64_t t, int64_t o, float sum) { stream[t * channels + o] += sum; };
    auto make = [&](const W* weight, int64_t outer, int64_t start) {
        product<W>(inputs, weight, tokens, channels, outer, room,
                   [&](int64_t t, int64_t o, float sum) { at.made[t * width + start + o] = sum; });
    };
    norm(own.norm1);
    make(own.q, queries, 0);
    if (own.where != nullptr) {
        make(own.k, keys, queries);
        make(own.v, keys, queries + keys);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const float* made = at.made.data() + t * width;
        for (int64_t i = 0; i < queries; i += dim) turned(made + i, at.queries.data() + t * queries + i, dim, own.turns, t);
        if (own.where == nullptr || own.where[t] < 0) continue;
        W *key = k + own.where[t] * keys, *value = v + own.where[t] * keys;
        for (int64_t i = 0; i < keys; i += dim) turned(made + queries + i, key + i, dim, own.turns, t);
        for (int64_t i = 0; i < keys; i++) narrow(made[queries + keys + i], value + i);
    }
    attend<W, float>(at.queries.data(), k, v, inputs, own.lists, tokens, shape.heads, shape.scale);
    product<W>(inputs, own.o, tokens, queries, channels, room, add);
    norm(own.norm2);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks_of(hidden); block++) {
        const float* gate = outputs(inputs, own.gate, tokens, channels, hidden, block, room.weights, room.totals);
        const float* up = outputs(inputs, own.up, tokens, channels, hidden, block, room.weights, room.more);
        int64_t first = block * OUTPUTS, count = std::min<int64_t>(OUTPUTS, hidden - first);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t o = 0; o < count; o++)
                narrow(silu(gate[t * OUTPUTS + o]) * up[t * OUTPUTS + o], inner + t * hidden + first + o);
    }
    product<W>(inner, own.down, tokens, hidden, channels, room, add);
}

// x [tokens, channels] through some blocks -> y. Between blocks nothing is rounded.
template <class W>
static void blocks(const W* x, W* y, const std::vector<Block<W>>& all, const Shape& shape, W* k, W* v) {
    const int64_t tokens = shape.tokens, numbers = tokens * shape.channels;
    const int64_t keys = shape.heads.kv_heads * shape.heads.dim, queries = keys * shape.heads.group;
    Scratch<W> at;
    at.stream.resize(numbers);
    at.made.resize(tokens * (queries + 2 * keys));
    at.queries.resize(tokens * queries);
    at.inputs.resize(tokens * std::max(shape.channels, queries));
    at.inner.resize(tokens * shape.hidden);
    for (int64_t i = 0; i < numbers; i++) at.stream[i] = widen(x[i]);
#pragma omp parallel
    {
        Room room;
        for (const Block<W>& own : all) block(own, shape, k, v, at, room);
    }
    for (int64_t i = 0; i < numbers; i++) narrow(at.stream[i], y + i);
}
