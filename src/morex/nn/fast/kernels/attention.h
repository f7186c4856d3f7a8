// Attention of a few queries over pages of keys and values.

#pragma once

#include "linear.h"

struct Lists {
    const int32_t* table;  // pages of each list [lists, stride]
    int64_t stride, page;  // entries of a page
    const int32_t *row, *start, *end;  // of each query: its list, and the entries that it sees
};

struct Heads {
    int64_t kv_heads, group, dim;  // query heads of a key/value head
};

// What one thread needs for one query token: where its entries are, scores, and heads in wider numbers.
template <class A>
struct HeadRoom {
    std::vector<int64_t> entries;
    std::vector<A> scores;
    int64_t width;  // from one query head's scores to the next's
    std::vector<float> queries, keys;
};

constexpr int64_t AHEAD = 8;

// Asks memory for one head of an entry some entries ahead: entries stand apart, which a processor does not foresee.
template <class T>
static inline void ask(const T* x, const std::vector<int64_t>& entries, int64_t e, int64_t count, int64_t stride,
                       int64_t start, int64_t dim) {
    const T* at = x + entries[std::min(e + AHEAD, count - 1)] * stride + start;
    for (int64_t i = 0; i < dim; i += 64 / sizeof(T)) __builtin_prefetch(at + i);
}

// scores[g * width + e] = q[g] . key of entry e.
template <class T>
static void score(const T* q, const T* k, const Heads& heads, int64_t h, HeadRoom<float>& room, int64_t count) {
    const int64_t dim = heads.dim, group = heads.group;
    const Factor<T>* queries = factors(q, group * dim, room.queries);
    if constexpr (!std::is_same_v<Factor<T>, T>) room.keys.resize(OUTPUTS * dim);
    for (int64_t e = 0; e < count; e += OUTPUTS) {
        const Factor<T>* each[OUTPUTS];
        for (int64_t o = 0; o < OUTPUTS; o++) ask(k, room.entries, e + o, count, heads.kv_heads * dim, h * dim, dim);
        for (int64_t o = 0; o < OUTPUTS; o++) {
            const T* key = k + (room.entries[std::min(e + o, count - 1)] * heads.kv_heads + h) * dim;
            if constexpr (std::is_same_v<Factor<T>, T>) {
                each[o] = key;
            } else {
                for (int64_t i = 0; i < dim; i++) room.keys[o * dim + i] = widen(key[i]);
                each[o] = room.keys.data() + o * dim;
            }
        }
        strip<false>(queries, group, dim, each, dim, room.scores.data() + e, room.width);
    }
}

static void score(const double* q, const double* k, const Heads& heads, int64_t h, HeadRoom<double>& room,
                  int64_t count) {
    for (int64_t e = 0; e < count; e++) {
        const double* key = k + (room.entries[e] * heads.kv_heads + h) * heads.dim;
        for (int64_t g = 0; g < heads.group; g++) {
            double total = 0;
            for (int64_t i = 0; i < heads.dim; i++) total += q[g * heads.dim + i] * key[i];
            room.scores[g * room.width + e] = total;
        }
    }
}

template <class A>
static inline void softmax(A* scores, int64_t count, A scale) {
    A most = scores[0], total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t e = 1; e < count; e++) most = std::max(most, scores[e]);
#pragma omp simd
    for (int64_t e = 0; e < count; e++) scores[e] = exponential((scores[e] - most) * scale);
#pragma omp simd reduction(+ : total)
    for (int64_t e = 0; e < count; e++) total += scores[e];
    for (int64_t e = 0; e < count; e++) scores[e] /= total;
}

// out[g] = sum over entries of probability times value, for G query heads of DIM channels, which stay in registers.
template <int DIM, int G, class T>
static inline void mix(const float* scores, const T* v, float* out, int64_t stride,
                       const std::vector<int64_t>& entries, int64_t count, int64_t width) {
    constexpr int PARTS = DIM / LANES;
    Floats totals[G][PARTS] = {};
    for (int64_t e = 0; e < count; e++) {
        const T* value = v + entries[e] * stride;
        ask(v, entries, e, count, stride, 0, DIM);
        Floats parts[PARTS];
        for (int i = 0; i < PARTS; i++) parts[i] = load(value + i * LANES);
        for (int g = 0; g < G; g++) {
            Floats weight = scores[g * width + e] - Floats{};
            for (int i = 0; i < PARTS; i++) totals[g][i] = fused(weight, parts[i], totals[g][i]);
        }
    }
    for (int g = 0; g < G; g++)
        for (int i = 0; i < PARTS; i++) store(totals[g][i], out + g * DIM + i * LANES);
}

template <int DIM, class T, class A>
static void combine(const T* v, const Heads& heads, int64_t h, HeadRoom<A>& room, int64_t count, A* out) {
    const int64_t dim = heads.dim, group = heads.group, stride = heads.kv_heads * dim, width = room.width;
    const std::vector<int64_t>& entries = room.entries;
    const A* scores = room.scores.data();
    v += h * dim;
    if constexpr (DIM != 0 && std::is_same_v<A, float>) {
        constexpr int G = std::clamp(TOTALS * LANES / DIM, 1, 4);
        int64_t g = 0;
        if constexpr (G >= 3)
            if (group == 3) return mix<DIM, 3>(scores, v, out, stride, entries, count, width);
        for (; g + G <= group; g += G) mix<DIM, G>(scores + g * width, v, out + g * dim, stride, entries, count, width);
        for (; g < group; g++) mix<DIM, 1>(scores + g * width, v, out + g * dim, stride, entries, count, width);
    } else {
        std::fill(out, out + group * dim, A(0));
        for (int64_t e = 0; e < count; e++)
            for (int64_t g = 0; g < group; g++)
                for (int64_t i = 0; i < dim; i++)
                    out[g * dim + i] += scores[g * width + e] * A(widen(v[entries[e] * stride + i]));
    }
}

// One key/value head of one query token: its query heads over the entries that they see.
template <int DIM, class T, class A>
static void head(const T* q, const T* k, const T* v, A* out, const Lists& lists, int64_t n, int64_t h,
                 const Heads& heads, A scale, HeadRoom<A>& room) {
    const int64_t start = lists.start[n], count = lists.end[n] - start;
    const int32_t* pages = lists.table + lists.row[n] * lists.stride;
    room.entries.resize(count);
    for (int64_t e = 0, at = start; e < count; e++, at++)
        room.entries[e] = pages[at / lists.page] * lists.page + at % lists.page;
    room.width = blocks_of(count) * OUTPUTS;
    room.scores.resize(heads.group * room.width);
    score(q, k, heads, h, room, count);
    for (int64_t g = 0; g < heads.group; g++) softmax(room.scores.data() + g * room.width, count, scale);
    combine<DIM>(v, heads, h, room, count, out);
}

// Within a parallel region: q [queries, kv_heads, group, dim] -> out, in numbers of its own.
template <class T, class A, class Y>
static void attend(const T* q, const T* k, const T* v, Y* out, const Lists& lists, int64_t queries, const Heads& heads,
                   A scale) {
    auto run = heads.dim == 64    ? head<64, T, A>
               : heads.dim == 128 ? head<128, T, A>
               : heads.dim == 32  ? head<32, T, A>
                                  : head<0, T, A>;
    HeadRoom<A> room;
    std::vector<A> totals(heads.group * heads.dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < queries * heads.kv_heads; task++) {
        int64_t at = task * heads.group * heads.dim;
        run(q + at, k, v, totals.data(), lists, task / heads.kv_heads, task % heads.kv_heads, heads, scale, room);
        for (int64_t i = 0; i < heads.group * heads.dim; i++) narrow(totals[i], out + at + i);
    }
}
