// Kernels for decoding on a CPU: products of a few rows with a weight matrix, and attention of a few queries over pages.
// Called through ctypes by `native.py`. What they compute stands in torch in `morex/nn/linear.py` and `morex/nn/pages.py`.
//
// Every number of an output is summed by one thread in an order that depends on the inner size alone, so that results
// depend neither on the number of threads nor on the other rows.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64, TOKENS = 6;
#elif defined(__AVX__)
constexpr int BYTES = 32, TOKENS = 3;
#else
constexpr int BYTES = 16, TOKENS = 3;
#endif
constexpr int LANES = BYTES / 4, OUTPUTS = 4;

typedef float Floats __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));

struct Bfloat {
    uint16_t bits;
};

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(Bfloat x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &word, 4);
    return wide;
}

static inline void narrow(float x, float* out) { *out = x; }
static inline void narrow(double x, double* out) { *out = x; }
static inline void narrow(float x, Bfloat* out) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if ((word & 0x7fffffff) > 0x7f800000) {
        out->bits = 0x7fc0;  // not a number stays none
        return;
    }
    out->bits = (word + 0x7fff + ((word >> 16) & 1)) >> 16;  // to the nearest, ties to even
}

static inline Floats load(const float* x) {
    Floats v;
    std::memcpy(&v, x, BYTES);
    return v;
}

static inline Floats load(const Bfloat* x) {
    Halves halves;
    std::memcpy(&halves, x, BYTES / 2);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

// Compilers decide from place to place whether to fuse; here all agree.
static inline Floats fused(Floats a, Floats b, Floats total) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)total);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)total);
#else
    for (int i = 0; i < LANES; i++) total[i] = std::fma(a[i], b[i], total[i]);
    return total;
#endif
}

typedef float Quad __attribute__((vector_size(16)));

static inline float sum(Floats v) {
    Quad parts[BYTES / 16];
    std::memcpy(parts, &v, BYTES);
    for (int i = 1; i < BYTES / 16; i++) parts[0] += parts[i];
    parts[0] += __builtin_shufflevector(parts[0], parts[0], 2, 3, 0, 1);
    return parts[0][0] + parts[0][1];
}

// y[t][o] = x[t] . w[o] for T rows of x and O rows of w.
template <int T, int O, class Y>
static inline void tile(const float* x, const float* w, Y* y, int64_t inner, int64_t outer) {
    Floats totals[T][O] = {};
    int64_t i = 0;
    for (; i + LANES <= inner; i += LANES) {
        Floats weights[O];
        for (int o = 0; o < O; o++) weights[o] = load(w + o * inner + i);
        for (int t = 0; t < T; t++) {
            Floats row = load(x + t * inner + i);
            for (int o = 0; o < O; o++) totals[t][o] = fused(row, weights[o], totals[t][o]);
        }
    }
    for (int t = 0; t < T; t++)
        for (int o = 0; o < O; o++) {
            float total = sum(totals[t][o]);
            for (int64_t j = i; j < inner; j++) total = std::fma(x[t * inner + j], w[o * inner + j], total);
            narrow(total, y + t * outer + o);
        }
}

template <int O, class Y>
static inline void strip(const float* x, const float* w, Y* y, int64_t rows, int64_t inner, int64_t outer) {
    int64_t t = 0;
    for (; t + TOKENS <= rows; t += TOKENS) tile<TOKENS, O>(x + t * inner, w, y + t * outer, inner, outer);
    if (t + 2 <= rows) tile<2, O>(x + t * inner, w, y + t * outer, inner, outer), t += 2;
    for (; t < rows; t++) tile<1, O>(x + t * inner, w, y + t * outer, inner, outer);
}

static inline const float* widened(const float* x, int64_t, std::vector<float>&) { return x; }
static inline const float* widened(const Bfloat* x, int64_t count, std::vector<float>& room) {
    if ((int64_t)room.size() < count) room.resize(count);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        Floats wide = load(x + i);
        std::memcpy(room.data() + i, &wide, BYTES);
    }
    for (; i < count; i++) room[i] = widen(x[i]);
    return room.data();
}

template <class W>
static void linear(const W* x, const W* w, W* y, int64_t rows, int64_t inner, int64_t outer) {
    std::vector<float> inputs;
    const float* from = widened(x, rows * inner, inputs);
    int64_t blocks = (outer + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel if (rows * inner * outer > 65536)
    {
        std::vector<float> room;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t o = block * OUTPUTS, count = std::min<int64_t>(OUTPUTS, outer - o);
            const float* weights = widened(w + o * inner, count * inner, room);
            if (count == OUTPUTS)
                strip<OUTPUTS>(from, weights, y + o, rows, inner, outer);
            else
                for (int64_t i = 0; i < count; i++) strip<1>(from, weights + i * inner, y + o + i, rows, inner, outer);
        }
    }
}

// e^x for x <= 0, to 2 units in the last place.
static inline float exponential(float x) {
    x = std::max(x, -87.0f);
    float n = std::floor(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}
static inline double exponential(double x) { return std::exp(x); }

struct Lists {
    const int32_t* table;  // pages of each list [lists, stride]
    int64_t stride, page;  // entries of a page
    const int32_t *row, *start, *end;  // of each query: its list, and the entries that it sees
};

// One key/value head of one query token: `group` query heads over the entries that they see.
template <int DIM, class T, class A>
static void head(const T* q, const T* k, const T* v, T* out, const Lists& lists, int64_t n, int64_t h, int64_t kv_heads,
                 int64_t group, int64_t any_dim, A scale, std::vector<A>& room) {
    const int64_t dim = DIM ? DIM : any_dim, start = lists.start[n], count = lists.end[n] - start;
    room.assign(group * (count + 2 * dim), A(0));
    A *scores = room.data(), *queries = scores + group * count, *totals = queries + group * dim;
    const int32_t* pages = lists.table + lists.row[n] * lists.stride;
    for (int64_t i = 0; i < group * dim; i++) queries[i] = A(widen(q[i])) * scale;
    for (int64_t e = 0; e < count; e++) {
        int64_t at = start + e, entry = pages[at / lists.page] * lists.page + at % lists.page;
        const T* key = k + (entry * kv_heads + h) * dim;
        for (int64_t g = 0; g < group; g++) {
            A total = 0;
#pragma omp simd reduction(+ : total)
            for (int64_t i = 0; i < dim; i++) total += queries[g * dim + i] * A(widen(key[i]));
            scores[g * count + e] = total;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        A *own = scores + g * count, most = own[0], total = 0;
#pragma omp simd reduction(max : most)
        for (int64_t e = 1; e < count; e++) most = std::max(most, own[e]);
#pragma omp simd
        for (int64_t e = 0; e < count; e++) own[e] = exponential(own[e] - most);
#pragma omp simd reduction(+ : total)
        for (int64_t e = 0; e < count; e++) total += own[e];
        for (int64_t e = 0; e < count; e++) own[e] /= total;
    }
    for (int64_t e = 0; e < count; e++) {
        int64_t at = start + e, entry = pages[at / lists.page] * lists.page + at % lists.page;
        const T* value = v + (entry * kv_heads + h) * dim;
        for (int64_t g = 0; g < group; g++) {
            A weight = scores[g * count + e];
            for (int64_t i = 0; i < dim; i++) totals[g * dim + i] += weight * A(widen(value[i]));
        }
    }
    for (int64_t i = 0; i < group * dim; i++) narrow(totals[i], out + i);
}

template <int DIM, class T, class A>
static void heads(const T* q, const T* k, const T* v, T* out, const Lists& lists, int64_t queries, int64_t kv_heads,
                  int64_t group, int64_t dim, A scale) {
#pragma omp parallel
    {
        std::vector<A> room;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < queries * kv_heads; task++) {
            int64_t n = task / kv_heads, h = task % kv_heads, at = (n * kv_heads + h) * group * dim;
            head<DIM, T, A>(q + at, k, v, out + at, lists, n, h, kv_heads, group, dim, scale, room);
        }
    }
}

template <class T, class A>
static void attend(const void* q, const void* k, const void* v, void* out, const Lists& lists, int64_t queries,
                   int64_t kv_heads, int64_t group, int64_t dim, double scale) {
    auto run = dim == 64 ? heads<64, T, A> : dim == 128 ? heads<128, T, A> : dim == 32 ? heads<32, T, A> : heads<0, T, A>;
    run((const T*)q, (const T*)k, (const T*)v, (T*)out, lists, queries, kv_heads, group, dim, A(scale));
}

extern "C" {
void linear_f32(const void* x, const void* w, void* y, int64_t rows, int64_t inner, int64_t outer) {
    linear((const float*)x, (const float*)w, (float*)y, rows, inner, outer);
}
void linear_bf16(const void* x, const void* w, void* y, int64_t rows, int64_t inner, int64_t outer) {
    linear((const Bfloat*)x, (const Bfloat*)w, (Bfloat*)y, rows, inner, outer);
}
#define ATTEND(name, T, A)                                                                                             \
    void name(const void* q, const void* k, const void* v, void* out, const int32_t* table, int64_t stride,            \
              int64_t page, const int32_t* row, const int32_t* start, const int32_t* end, int64_t queries,            \
              int64_t kv_heads, int64_t group, int64_t dim, double scale) {                                            \
        attend<T, A>(q, k, v, out, {table, stride, page, row, start, end}, queries, kv_heads, group, dim, scale);      \
    }
ATTEND(attend_f32, float, float)
ATTEND(attend_bf16, Bfloat, float)
ATTEND(attend_f64, double, double)
}
