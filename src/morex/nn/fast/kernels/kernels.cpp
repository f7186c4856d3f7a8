// Kernels for decoding on a CPU, called through ctypes by `native.py`. What they compute stands in torch in
// `morex/nn/linear.py`, `morex/nn/attention.py` and `morex/nn/block.py`.

#include "block.h"

extern "C" {
#define KERNELS(name, T)                                                                                               \
    void linear_##name(const void* x, const void* w, void* y, int64_t rows, int64_t inner, int64_t outer) {            \
        linear((const T*)x, (const T*)w, (T*)y, rows, inner, outer);                                                   \
    }                                                                                                                  \
    void block_##name(const void* x, void* y, const void* const* weights, const int64_t* sizes, double epsilon,        \
                      void* k, void* v, const int64_t* where, const int32_t* table, const int32_t* row,                \
                      const int32_t* start, const int32_t* end, const float* cos, const float* sin, double scale) {    \
        auto [tokens, channels, hidden, kv_heads, group, dim, stride, page] = *(const int64_t(*)[8])sizes;             \
        const T* const* w = (const T* const*)weights;                                                                  \
        Block<T> own{w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], channels, hidden, float(epsilon)};          \
        Pages<T> pages{(T*)k, (T*)v, where, {table, stride, page, row, start, end}};                                   \
        block((const T*)x, (T*)y, tokens, own, pages, {kv_heads, group, dim}, {cos, sin}, float(scale));               \
    }
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
