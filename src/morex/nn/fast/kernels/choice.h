// The largest of many numbers.

#pragma once

#include "numbers.h"

// x [size] -> the place of the first of the largest numbers; `top` is that number, or none where any number is none.
template <class T>
static int64_t likeliest(const T* x, int64_t size, T* top) {
    constexpr int64_t BLOCK = 64 * LANES;
    float best = -INFINITY;
    int64_t found = 0, i = 0;
    auto bad = Floats{} != Floats{};
    for (int64_t start = 0; start + LANES <= size; start = i) {
        Floats most = load(x + start);
        for (i = start; i + LANES <= std::min(size, start + BLOCK); i += LANES) {
            Floats v = load(x + i);
            bad |= v != v;
            most = v > most ? v : most;
        }
        float high = most[0];
        for (int lane = 1; lane < LANES; lane++) high = std::max(high, most[lane]);
        if (high > best) best = high, found = start;
    }
    bool is_none = false;
    for (int lane = 0; lane < LANES; lane++) is_none |= bad[lane] != 0;
    for (; i < size; i++) {
        float v = widen(x[i]);
        is_none |= v != v;
        if (v > best) best = v, found = i;
    }
    while (found + 1 < size && widen(x[found]) != best) found++;
    narrow(is_none ? NAN : best, top);
    return found;
}
