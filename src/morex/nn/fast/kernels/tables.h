// Pages of lists: where their next entries go.

#pragma once

#include "numbers.h"

// As `PageTables` in tables.py.
struct Tables {
    int32_t* pages;  // [lists, width, most]
    int64_t* counts;
    const bool* is_forked;
    int64_t *lengths, *times;  // `times`: of each entry of the pool
    const int32_t* free;       // pages of the pool that nobody holds
    int32_t* holders;          // how many hold each page of the pool
    int64_t width, most, size, num_free;
};

// What came of a claim: where the tokens' keys and values go, and what their attention sees.
struct Claimed {
    int64_t* where;  // entry of the pool, at each place of the stream [width, tokens]
    int32_t *list, *row, *start, *end;  // [tokens]
};

// Adds tokens to some lists, `added` to each, as entries, in pages of the pool where they lack any. 1 if all lists were
// empty before, 0 if not; -1, and nothing is done, where others may hold the page that the first token of some list goes
// to, where a list has no room for its pages, or the pool has not enough.
static int64_t claim(Tables& own, const int64_t* numbers, const int64_t* added, int64_t rows, int64_t tokens,
                     const int64_t* time, const Claimed& out) {
    int64_t taken = 0;
    for (int64_t row = 0; row < rows; row++) {
        int64_t number = numbers[row], length = own.lengths[number];
        int64_t pages = (length + added[row] + own.size - 1) / own.size;
        if (own.is_forked[number] && added[row] && length % own.size) return -1;
        if (pages > own.most) return -1;
        taken += own.width * std::max<int64_t>(0, pages - own.counts[number]);
    }
    if (taken > own.num_free) return -1;
    own.num_free -= taken;
    const int32_t* fresh_pages = own.free + own.num_free;
    bool fresh = true;
    for (int64_t row = 0, token = 0; row < rows; row++) {
        int64_t number = numbers[row], entry = own.lengths[number];
        fresh = fresh && entry == 0;
        own.lengths[number] += added[row];
        int32_t* pages = own.pages + number * own.width * own.most;
        int64_t count = own.counts[number], wanted = (own.lengths[number] + own.size - 1) / own.size;
        for (int64_t place = 0; place < own.width && count < wanted; place++)
            for (int64_t i = count; i < wanted; i++) {
                pages[place * own.most + i] = *fresh_pages;
                own.holders[*fresh_pages++] = 1;
            }
        own.counts[number] = std::max(count, wanted);
        for (; entry < own.lengths[number]; entry++, token++) {
            const int32_t* page = pages + entry / own.size;
            for (int64_t place = 0; place < own.width; place++)
                out.where[place * tokens + token] = page[place * own.most] * own.size + entry % own.size;
            own.times[out.where[token]] = time[token];
            out.list[token] = number, out.row[token] = row, out.start[token] = 0, out.end[token] = entry + 1;
        }
    }
    return fresh;
}
