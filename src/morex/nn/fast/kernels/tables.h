// Pages of lists: where their next entries go.

#pragma once

#include "numbers.h"

// As `PageTables` in tables.py.
struct Tables {
    const int32_t* pages;  // [lists, width, most]
    const int64_t* counts;
    const bool* is_forked;
    int64_t *lengths, *times;  // `times`: of each entry of the pool
    int64_t width, most, size;
};

// What came of a claim: where the tokens' keys and values go, and what their attention sees.
struct Claimed {
    int64_t* where;  // entry of the pool, at each place of the stream [width, tokens]
    int32_t *list, *row, *start, *end;  // [tokens]
};

// Adds tokens to some lists, `added` to each, as entries. 1 if all lists were empty before, 0 if not; -1, and nothing is
// done, where some lack something: `lacks` says of each list how many pages, times 2, plus 1 where others may hold the
// page that the first of the tokens goes to.
static int64_t claim(const Tables& own, const int64_t* numbers, const int64_t* added, int64_t rows, int64_t tokens,
                     const int64_t* time, const Claimed& out, int64_t* lacks) {
    bool all = true;
    for (int64_t row = 0; row < rows; row++) {
        int64_t number = numbers[row], length = own.lengths[number];
        int64_t pages = (length + added[row] + own.size - 1) / own.size - own.counts[number];
        bool shares = own.is_forked[number] && added[row] && length % own.size;
        lacks[row] = 2 * std::max<int64_t>(0, pages) + shares;
        all = all && lacks[row] == 0;
    }
    if (!all) return -1;
    bool fresh = true;
    for (int64_t row = 0, token = 0; row < rows; row++) {
        int64_t number = numbers[row], entry = own.lengths[number];
        fresh = fresh && entry == 0;
        own.lengths[number] += added[row];
        for (; entry < own.lengths[number]; entry++, token++) {
            const int32_t* page = own.pages + number * own.width * own.most + entry / own.size;
            for (int64_t place = 0; place < own.width; place++)
                out.where[place * tokens + token] = page[place * own.most] * own.size + entry % own.size;
            own.times[out.where[token]] = time[token];
            out.list[token] = number, out.row[token] = row, out.start[token] = 0, out.end[token] = entry + 1;
        }
    }
    return fresh;
}
