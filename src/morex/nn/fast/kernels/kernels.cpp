// Kernels for decoding on a CPU, called through ctypes by `native.py`. What they compute stands in torch in
// `morex/nn/linear.py`, `morex/nn/attention.py`, `morex/nn/block.py` and `morex/experts/recursive.py`.

#include "choice.h"
#include "experts.h"
#include "tables.h"

// As `Step`, `Sight` and `Walk` in walk.py.
struct Step {
    const void* weights[9];
    double epsilon;
};

struct Sight {
    const int32_t *start, *end;
    const float *cos, *sin;
    const int64_t* places;
};

struct Walk {
    int64_t steps, tokens, channels, hidden, kv_heads, group, dim, most, page, sights;  // `sights`: one, or one a step
    double scale;
    const int32_t *list, *pages;
    const int64_t* where;
    void *k, *v;
};

template <class W>
static void walk(const void* x, void* y, const Walk& walk, const Step* steps, const Sight* sights) {
    std::vector<Block<W>> all;
    for (int64_t i = 0; i < walk.steps; i++) {
        const W* const* w = (const W* const*)steps[i].weights;
        const Sight& sight = sights[walk.sights > 1 ? i : 0];
        Lists lists{walk.pages + i * walk.most, walk.steps * walk.most, walk.page, walk.list, sight.start, sight.end};
        const int64_t* where = walk.where == nullptr ? nullptr : walk.where + i * walk.tokens;
        all.push_back({w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], float(steps[i].epsilon), where, lists,
                       {sight.cos, sight.sin, sight.places}});
    }
    Heads heads{walk.kv_heads, walk.group, walk.dim};
    Shape shape{walk.tokens, walk.channels, walk.hidden, heads, float(walk.scale)};
    blocks((const W*)x, (W*)y, all, shape, (W*)walk.k, (W*)walk.v);
}

extern "C" {
int64_t claim_i64(Tables* tables, const int64_t* numbers, const int64_t* added, int64_t rows, int64_t tokens,
                  const int64_t* time, const Claimed* out) {
    return claim(*tables, numbers, added, rows, tokens, time, *out);
}

#define KERNELS(name, T)                                                                                               \
    void linear_##name(const void* x, const void* w, void* y, int64_t rows, int64_t inner, int64_t outer) {            \
        linear((const T*)x, (const T*)w, (T*)y, rows, inner, outer);                                                   \
    }                                                                                                                  \
    void likeliest_##name(const void* x, int64_t* tokens, void* top, int64_t rows, int64_t size) {                     \
        _Pragma("omp parallel for if (rows * size > 65536)") for (int64_t row = 0; row < rows; row++)                  \
            tokens[row] = likeliest((const T*)x + row * size, size, (T*)top + row);                                    \
    }                                                                                                                  \
    void norm_##name(const void* x, const void* w, void* y, int64_t rows, int64_t channels, double epsilon) {          \
        norm((const T*)x, (const T*)w, (T*)y, rows, channels, float(epsilon));                                         \
    }                                                                                                                  \
    void project_##name(const void* x, void* y, const void* const* w, const float* cos, const float* sin,              \
                        const int64_t* sizes) {                                                                        \
        auto [rows, channels, queries, keys, values, dim] = *(const int64_t(*)[6])sizes;                               \
        const int64_t outer[]{queries, keys, values};                                                                  \
        project((const T*)x, (const T* const*)w, (T*)y, rows, channels, outer, dim, Turns{cos, sin, nullptr});                  \
    }                                                                                                                  \
    void blocks_##name(const void* x, void* y, const Walk* own, const Step* steps, const Sight* sights) {            \
        walk<T>(x, y, *own, steps, sights);                                                                            \
    }

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
