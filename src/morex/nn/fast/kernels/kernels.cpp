// Kernels for decoding on a CPU, called through ctypes by `native.py`. What they compute stands in torch in
// `morex/nn/linear.py`, `morex/nn/attention.py`, `morex/nn/block.py` and `morex/experts/recursive.py`.

#include "experts.h"

// As `Step` and `Walk` in native.py.
struct Step {
    const void* weights[9];
    double epsilon;
    const int64_t* where;
    const int32_t *table, *start, *end;
    const float *cos, *sin;
};

struct Walk {
    int64_t steps, tokens, channels, hidden, kv_heads, group, dim, stride, page;
    double scale;
    const int32_t* row;
    void *k, *v;
};

template <class W>
static void walk(const void* x, void* y, const Walk& walk, const Step* steps) {
    std::vector<Block<W>> all;
    for (int64_t i = 0; i < walk.steps; i++) {
        const Step& own = steps[i];
        const W* const* w = (const W* const*)own.weights;
        Lists lists{own.table, walk.stride, walk.page, walk.row, own.start, own.end};
        all.push_back({w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], float(own.epsilon), own.where, lists,
                       {own.cos, own.sin}});
    }
    Heads heads{walk.kv_heads, walk.group, walk.dim};
    Shape shape{walk.tokens, walk.channels, walk.hidden, heads, float(walk.scale)};
    blocks((const W*)x, (W*)y, all, shape, (W*)walk.k, (W*)walk.v);
}

extern "C" {
#define KERNELS(name, T)                                                                                               \
    void linear_##name(const void* x, const void* w, void* y, int64_t rows, int64_t inner, int64_t outer) {            \
        linear((const T*)x, (const T*)w, (T*)y, rows, inner, outer);                                                   \
    }                                                                                                                  \
    void norm_##name(const void* x, const void* w, void* y, int64_t rows, int64_t channels, double epsilon) {          \
        norm((const T*)x, (const T*)w, (T*)y, rows, channels, float(epsilon));                                         \
    }                                                                                                                  \
    void project_##name(const void* x, void* y, const void* const* w, const float* cos, const float* sin,              \
                        const int64_t* sizes) {                                                                        \
        auto [rows, channels, queries, keys, values, dim] = *(const int64_t(*)[6])sizes;                               \
        const int64_t outer[]{queries, keys, values};                                                                  \
        project((const T*)x, (const T* const*)w, (T*)y, rows, channels, outer, dim, Turns{cos, sin});                  \
    }                                                                                                                  \
    void blocks_##name(const void* x, void* y, const Walk* own, const Step* steps) { walk<T>(x, y, *own, steps); }

#define EXPERTS(name, T)                                                                                               \
    void experts_##name(const void* x, void* y, const int64_t* chosen, const float* shares, const void* const* w,      \
                        const int64_t* sizes, double epsilon) {                                                        \
        auto [tokens, each, channels, values, queries, hidden, dim, loops] = *(const int64_t(*)[8])sizes;              \
        const T* const* s = (const T* const*)w;                                                                        \
        Experts<T> all{s[0], s[1],     s[2],   s[3],    s[4],   s[5], s[6],  s[7],                                     \
                       s[8], channels, values, queries, hidden, dim,  loops, float(epsilon)};                          \
        experts((const T*)x, (T*)y, chosen, shares, tokens, each, all);                                                \
    }
EXPERTS(f32, float)
EXPERTS(bf16, Bfloat)

KERNELS(f32, float)
KERNELS(bf16, Bfloat)

#define ATTEND(name, T, A)                                                                                             \
    void attend_##name(const void* q, const void* k, const void* v, void* out, const int32_t* table, int64_t stride,   \
                       int64_t page, const int32_t* row, const int32_t* start, const int32_t* end, int64_t queries,    \
                       int64_t kv_heads, int64_t group, int64_t dim, double scale) {                                   \
        Lists lists{table, stride, page, row, start, end};                                                             \
        _Pragma("omp parallel") attend<T, A>((const T*)q, (const T*)k, (const T*)v, (T*)out, lists, queries,           \
                                             Heads{kv_heads, group, dim}, A(scale));                                   \
    }
ATTEND(f32, float, float)
ATTEND(bf16, Bfloat, float)
ATTEND(f64, double, double)
}
