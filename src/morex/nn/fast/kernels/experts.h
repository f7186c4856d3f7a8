// Recursive experts for a few tokens, each of which sees itself alone.

#pragma once

#include "block.h"

// Weights of all experts, stacked. Attention over the token alone is the product of `v` and `o`.
template <class W>
struct Experts {
    const W *steps, *norm_attention, *v, *o, *norm_mixer, *gate, *up, *down, *norm_out;  // no norm_out: z - x
    int64_t channels, values, queries, hidden, dim, loops;
    float epsilon;
};

template <class W>
struct ExpertRoom {
    Room room;
    std::vector<float> state, heads;
    std::vector<Factor<W>> inputs, wide;
};

// For one row: each output to `finish(output, sum)`.
template <class W, class Finish>
static inline void row_product(const Factor<W>* x, const W* w, int64_t inner, int64_t outer, Room& room,
                               const Finish& finish) {
    for (int64_t block = 0; block < blocks_of(outer); block++) {
        const float* totals = outputs(x, w, 1, inner, outer, block, room.weights, room.totals);
        int64_t first = block * OUTPUTS, count = std::min<int64_t>(OUTPUTS, outer - first);
        for (int64_t o = 0; o < count; o++) finish(first + o, totals[o]);
    }
}

// x [channels] through all steps of one expert -> y.
template <class W>
static void loop(const W* x, float* y, const Experts<W>& all, int64_t expert, ExpertRoom<W>& at) {
    const int64_t channels = all.channels, hidden = all.hidden, group = all.queries / all.values;
    const W *gate = all.gate + expert * hidden * channels, *up = all.up + expert * hidden * channels;
    at.state.resize(channels);
    at.heads.resize(std::max(hidden, all.values));
    at.inputs.resize(channels);
    at.wide.resize(std::max(hidden, all.queries));
    float *z = at.state.data(), *made = at.heads.data();
    Factor<W>*inputs = at.inputs.data(), *wide = at.wide.data();
    auto add = [&](int64_t o, float sum) { z[o] += sum; };
    auto keep = [&](int64_t o, float sum) { made[o] = sum; };
    for (int64_t i = 0; i < channels; i++) z[i] = widen(x[i]);
    for (int64_t s = 0; s < all.loops; s++) {
        for (int64_t i = 0; i < channels; i++) z[i] += widen(all.steps[(expert * all.loops + s) * channels + i]);
        normed(z, all.norm_attention + expert * channels, inputs, channels, all.epsilon);
        row_product(inputs, all.v + expert * all.values * channels, channels, all.values, at.room, keep);
        for (int64_t i = 0; i < all.queries; i++)
            narrow(made[i / all.dim / group * all.dim + i % all.dim], wide + i);
        row_product(wide, all.o + expert * channels * all.queries, all.queries, channels, at.room, add);
        normed(z, all.norm_mixer + expert * channels, inputs, channels, all.epsilon);
        row_product(inputs, gate, channels, hidden, at.room, keep);
        row_product(inputs, up, channels, hidden, at.room,
                    [&](int64_t o, float sum) { narrow(silu(made[o]) * sum, wide + o); });
        row_product(wide, all.down + expert * channels * hidden, hidden, channels, at.room, add);
    }
    if (all.norm_out != nullptr)
        normed(z, all.norm_out + expert * channels, y, channels, all.epsilon);
    else
        for (int64_t i = 0; i < channels; i++) y[i] = z[i] - widen(x[i]);
}

// x [tokens, channels] -> y: of each token the sum of its experts' branches, each times its share.
template <class W>
static void experts(const W* x, W* y, const int64_t* chosen, const float* shares, int64_t tokens, int64_t each,
                    const Experts<W>& all) {
    const int64_t channels = all.channels, work = tokens * each * channels * all.hidden * all.loops;
    std::vector<float> branches(tokens * each * channels);
#pragma omp parallel if (tokens * each > 1 && work > 65536)
    {
        ExpertRoom<W> at;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tokens * each; task++)
            loop(x + task / each * channels, branches.data() + task * channels, all, chosen[task], at);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t i = 0; i < channels; i++) {
                float total = 0;
                for (int64_t j = t * each; j < (t + 1) * each; j++) total += shares[j] * branches[j * channels + i];
                narrow(total, y + t * channels + i);
            }
    }
}
