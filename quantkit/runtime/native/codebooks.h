// Products of IQ1 and IQ2 types with 8-bit activations: eight weights are an entry of a codebook.
//
// A weight has three levels but for its sign, so an entry is a word of eight 2-bit codes, and 32 entries are one register.
// Plane i of it, codes i of all bytes, is decoded and multiplied at once; activations lie in planes too. So a 32-bit sum
// over the four planes is of 16 neighbouring weights, which have one scale: nothing has to be moved to its scale.
//
// Entries are looked up by permutations of registers where the codebook is small, else in memory. A superblock is exact
// in integers, as in ggml.
#pragma once
#include "wide.h"

// Entries as words, in memory eight bytes apart. Plane p has weights PLANE[p] and PLANE[p] + 2 of each entry, in its two bytes.
static struct {
    _Alignas(64) uint64_t iq1[1 + 2048], iq2_xxs[1 + 256], iq2_xs[1 + 512], iq2_s[1 + 1024];
    _Alignas(64) uint16_t iq2_xxs_words[256], iq2_xs_words[512], iq2_s_words[1024];
} codes;

typedef struct {
    _Alignas(64) int32_t pairs[16];
    _Alignas(16) uint8_t low[16], high[16];
} steps;

// Where bytes are taken from, and what words are multiplied by, which shifts them.
#define NONE 128
static struct {
    _Alignas(64) uint8_t word_of_4[64], word_of_8[64], byte_of_2[64], byte_of_4[64], first_four[64], last_byte[64], half_bytes[64], sevens[64];
    _Alignas(64) uint16_t three_bits[32], nibbles[32], threes[32], seven_bits[32], two_bits[32];
    _Alignas(64) int32_t zero_or_4[16];
    steps iq1_s, iq1_m;
    _Alignas(16) uint8_t levels[16], parity[16];
} patterns;

static void set_steps(steps *s, int k, int low, int high) {
    s->low[k] = (uint8_t)low;
    s->high[k] = (uint8_t)high;
    s->pairs[k] = low | high << 16;
}

static void set_tables(void) {
    memset(&patterns, NONE, sizeof patterns);
    for (int j = 0; j < 32; j++) {  // entry j is word j
        for (int i = 0; i < 2; i++) {
            patterns.word_of_4[2 * j + i] = (uint8_t)(j / 4 * 2 + i);
            patterns.word_of_8[2 * j + i] = (uint8_t)(j / 8 * 2 + i);
        }
        patterns.byte_of_2[2 * j] = (uint8_t)(j / 2);
        patterns.byte_of_4[2 * j] = (uint8_t)(j / 4);
        patterns.first_four[2 * j] = (uint8_t)(j / 4 % 2 * 8 + j % 4);
        patterns.three_bits[j] = (uint16_t)(0x200 >> 3 * (j % 4));
        patterns.nibbles[j] = j % 2 ? 0x20 : 0x200;
        patterns.threes[j] = (uint16_t)(0x2000 >> 3 * (j / 2 % 4));
        patterns.two_bits[j] = (uint16_t)(0x100 >> 2 * (j % 4));
#if defined(__AVX512VBMI__) && defined(__GFNI__)
        patterns.sevens[2 * j] = (uint8_t)(32 + 7 * (j % 4));
#else
        patterns.sevens[2 * j] = (uint8_t)(j / 4 % 2 * 8 + (const int[]){4, 4, 5, 6}[j % 4]);
        patterns.sevens[2 * j + 1] = patterns.sevens[2 * j] + 1;
        patterns.seven_bits[j] = (const uint16_t[]){128, 1, 2, 4}[j % 4];
#endif
    }
    for (int l = 0; l < 16; l++) {  // of 16 weights: 32 bits
        patterns.last_byte[4 * l] = l / 2 % 2 * 8 + 7;
        patterns.half_bytes[4 * l] = (uint8_t)(l / 2);
        patterns.zero_or_4[l] = l % 2 * 4;
        patterns.levels[l] = (const uint8_t[]){64 + 8, 64 + 25, 64 + 43, 64, 64 - 8, 64 - 25, 64 - 43, 64}[l % 8];
        patterns.parity[l] = 0x6996 >> l & 1 ? 128 : 0;
        const int s = 2 * (l % 8) + 1;
        set_steps(&patterns.iq1_s, l, 8 * s, (l & 8 ? 9 : 7) * s);
        set_steps(&patterns.iq1_m, l, 2 * s, 9 * s);
    }
}

// n entries of eight bytes each, whose levels are these.
static void set_codes(uint64_t *table, uint16_t *words, const uint8_t *from, int n, const uint8_t *levels) {
    for (int i = 0; i < n; i++) {
        uint16_t code = 0;
        for (int k = 0; k < 8; k++)
            for (int c = 1; c < 3; c++)
                if (from[8 * i + k] == levels[c]) code |= (uint16_t)(c << (k % 2 * 2 + k / 4 * 4 + k / 2 % 2 * 8));
        table[1 + i] = code;
        if (words) words[i] = code;
    }
}

// A table: 0 iq1, 1 iq2_xxs, 2 iq2_xs, 3 iq2_s.
static void set_codebook(int kind, const uint8_t *from) {
    static const uint8_t iq1[] = {0, 1, 2}, iq2[] = {8, 25, 43};
    set_tables();
    switch (kind) {
        case 0: set_codes(codes.iq1, 0, from, 2048, iq1); break;
        case 1: set_codes(codes.iq2_xxs, codes.iq2_xxs_words, from, 256, iq2); break;
        case 2: set_codes(codes.iq2_xs, codes.iq2_xs_words, from, 512, iq2); break;
        case 3: set_codes(codes.iq2_s, codes.iq2_s_words, from, 1024, iq2); break;
    }
}

typedef struct {
    vec w[4];         // bytes without signs, of each plane
    vec scale, high;  // of 16 weights: 32 bits; or words that sums of weights, and of activations, are multiplied by
    float d;
} planes;

// Lookups: 32 entries by the indices of words, which are doubled if the table is in memory.

#if !defined(GATHER)
#define GATHER 0
#endif
#if GATHER && defined(__AVX512F__)  // by the processor's own instruction, where that is fast
static inline vec gathered(const uint64_t *table, vec at) {
    const __m512i even = _mm512_i32gather_epi32(_mm512_and_si512(at, _mm512_set1_epi32(0xffff)), table, 4);
    const __m512i odd = _mm512_i32gather_epi32(_mm512_srli_epi32(at, 16), table, 4);
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}
#define CHUNK 1
#else  // a table's words are eight bytes apart: four loads, each two bytes further back, are ored into four entries
static inline uint64_t four_words(const uint64_t *table, const uint16_t *at) {
    const uint8_t *t = (const uint8_t *)table;
    const size_t a = at[0], b = at[1], c = at[2], d = at[3];
    return u64(t + 4 * a) | u64(t + 4 * b - 2) | u64(t + 4 * c - 4) | u64(t + 4 * d - 6);
}

static inline vec loaded(const uint64_t *table, const uint16_t *at) {
    int64_t f[8];
    for (int k = 0; k < 8; k++) f[k] = (int64_t)four_words(table, at + 4 * k);
#if defined(__AVX512F__)
    return _mm512_set_epi64(f[7], f[6], f[5], f[4], f[3], f[2], f[1], f[0]);
#else
    return (vec){_mm256_set_epi64x(f[3], f[2], f[1], f[0]), _mm256_set_epi64x(f[7], f[6], f[5], f[4])};
#endif
}
#define CHUNK 32  // superblocks whose indices are written before the first is read: what was just written is slow to read
#endif

typedef struct {
    const uint64_t *table;
    const uint16_t *words;  // the same for registers, or null
    int n_words;
} codebook;

#if defined(__AVX512F__)
static inline __m512i of_64(const uint16_t *words, __m512i at) {
    return _mm512_permutex2var_epi16(_mm512_load_si512(words), at, _mm512_load_si512(words + 32));
}

static inline __m512i of_256(const uint16_t *words, __m512i at) {
    const __mmask32 bit6 = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64)), bit7 = _mm512_test_epi16_mask(at, _mm512_set1_epi16(128));
    const __m512i low = _mm512_mask_blend_epi16(bit6, of_64(words, at), of_64(words + 64, at));
    const __m512i high = _mm512_mask_blend_epi16(bit6, of_64(words + 128, at), of_64(words + 192, at));
    return _mm512_mask_blend_epi16(bit7, low, high);
}

static inline __m512i of_512(const uint16_t *words, __m512i at) {
    const __mmask32 bit8 = _mm512_test_epi16_mask(at, _mm512_set1_epi16(256));
    return _mm512_mask_blend_epi16(bit8, of_256(words, at), of_256(words + 256, at));
}

static inline __m512i of_1024(const uint16_t *words, __m512i at) {
    const __mmask32 bit9 = _mm512_test_epi16_mask(at, _mm512_set1_epi16(512));
    return _mm512_mask_blend_epi16(bit9, of_512(words, at), of_512(words + 512, at));
}

static inline vec in_registers(const codebook *book, vec at) {
    return book->n_words == 256 ? of_256(book->words, at) : book->n_words == 512 ? of_512(book->words, at) : of_1024(book->words, at);
}
#endif

#if !defined(REGISTERS)
#define REGISTERS (GATHER ? 256 : 512)  // the largest codebook that is looked up in them
#endif
#if defined(__AVX512F__)
#define IN_REGISTERS(n) ((n) <= REGISTERS)
#else
#define IN_REGISTERS(n) ((n) < 0)
#endif

// Sums of 16 weights each, by their scales.

static inline vec without_signs(const planes *t, act_row y, int64_t b) {  // levels small enough for sums in 16 bits
    const int8_t *q = y.planes + SUPERBLOCK * b;
    const vec sums = load(y.high + SUPERBLOCK / 16 * b);
#if VNNI
    vec sum = fours(EACH(epi32, 0), t->w[0], load(q));
    for (int k = 1; k < 4; k++) sum = fours(sum, t->w[k], load(q + 64 * k));
    return add_products(low_and_high(sum, sums), t->scale);
#else
    vec sum = add_byte_products(t->w[0], load(q));
    for (int k = 1; k < 4; k++) sum = add16(sum, add_byte_products(t->w[k], load(q + 64 * k)));
    return add32(add_products(sum, t->scale), add_products(sums, t->high));
#endif
}

static inline vec with_signs(const planes *t, act_row y, int64_t b) {  // of levels that are 64 too large
    const int8_t *q = y.planes + SUPERBLOCK * b;
    vec sum = load(y.less + SUPERBLOCK / 16 * b);
    for (int k = 0; k < 4; k++) sum = fours(sum, t->w[k], load(q + 64 * k));
    return multiply32(sum, t->scale);
}

static inline vec placed(vec at, int n_words) { return IN_REGISTERS(n_words) ? at : add16(at, at); }

// n_rows rows of n_blocks superblocks of `bytes`, one after the other; index: of one's entries; decode: a superblock, given its
// entries; m rows of activations, whose sums stay in registers where m is a constant; out: n_rows x m products; then: what is
// read afterwards.
static inline __attribute__((always_inline)) void dot_planes(
    const uint8_t *row, int bytes, int64_t n_rows, int64_t n_blocks, const act_row *y, int m, float *out, const uint8_t *then, codebook book,
    vec (*index)(const uint8_t *), planes (*decode)(const uint8_t *, vec), vec (*product)(const planes *, act_row, int64_t)) {
    const int64_t ahead = book.words || CHUNK == 1 ? AHEAD : 2 * AHEAD;  // indices are read a chunk before the rest
    const uint8_t *const end = row + bytes * n_blocks * n_rows;
    const int64_t jump = then - end;
#if CHUNK > 1
    _Alignas(64) uint16_t at[32 * CHUNK];
    const uint16_t *from = at;
    int64_t written = 0;  // superblocks whose indices lie there and were not read
#endif
    for (int64_t r = 0; r < n_rows; r++, out += m) {
        floats sum[MOST_ROWS];
        for (int i = 0; i < m; i++) sum[i] = zeros();
        for (int64_t b = 0, stop; b < n_blocks;) {
            stop = n_blocks;
#if CHUNK > 1
            if (!book.words) {
                if (!written) {
                    const int64_t left = (n_rows - r) * n_blocks - b;
                    from = at;
                    written = left < CHUNK ? left : CHUNK;
                    for (int64_t k = 0; k < written; k++) store(at + 32 * k, index(row + bytes * k));
                }
                stop = b + written < n_blocks ? b + written : n_blocks;
                written -= stop - b;
            }
#endif
            for (; b < stop; b++, row += bytes) {
                prefetch(row + ahead, end, jump, bytes);
                vec v;
#if defined(__AVX512F__)
                if (book.words) v = in_registers(&book, index(row));
                else
#endif
#if CHUNK > 1
                    v = loaded(book.table, from), from += 32;
#else
                    v = gathered(book.table, index(row));
#endif
                const planes t = decode(row, v);
                for (int i = 0; i < m; i++) sum[i] = add_scaled(product(&t, y[i], b), t.d * y[i].d[b], sum[i]);
            }
        }
        for (int i = 0; i < m; i++) out[i] = total8(halves(sum[i]));
    }
}

#define PLANES(name, bytes, product, table, words, n)                                                                   \
    static void dot_##name(const uint8_t *rows, int64_t n_rows, int64_t n_blocks, const act_row *y, int m, float *out, const uint8_t *then) { \
        const codebook book = {table + 1, IN_REGISTERS(n) ? words : 0, n};                                              \
        switch (m) {                                                                                                    \
            case 1: dot_planes(rows, bytes, n_rows, n_blocks, y, 1, out, then, book, name##_at, name, product); return; \
            case 2: dot_planes(rows, bytes, n_rows, n_blocks, y, 2, out, then, book, name##_at, name, product); return; \
            case 3: dot_planes(rows, bytes, n_rows, n_blocks, y, 3, out, then, book, name##_at, name, product); return; \
            case 4: dot_planes(rows, bytes, n_rows, n_blocks, y, 4, out, then, book, name##_at, name, product); return; \
            default: dot_planes(rows, bytes, n_rows, n_blocks, y, m, out, then, book, name##_at, name, product);        \
        }                                                                                                               \
    }

// Without signs: n has the 4 bits (IQ1_S: sign, 3 bits of scale) or 3 bits (IQ1_M) that its scale is made of on top of every word.

static inline void scales_of(planes *t, vec n, int bits, const steps *s) {
#if VNNI && defined(__AVX512F__)
    t->scale = _mm512_permutexvar_epi32(_mm512_srli_epi32(n, 32 - bits), load(s->pairs));
#else
    const vec at = or(right16(n, 16 - bits), EACH(epi16, (int16_t)0x8000));
    t->scale = shuffle(load16(s->low), at);
    t->high = shuffle(load16(s->high), at);
#if VNNI
    t->scale = low_and_high(t->scale, t->high);
#endif
#endif
}

static inline vec iq1_s_at(const uint8_t *b) {
    const vec qh = shuffle(load16(b + 34), load(patterns.word_of_4)), low = load_words(b + 2);
    return and_or(multiply16(qh, load(patterns.three_bits)), EACH(epi16, 0x0e00), add16(low, low));
}

static inline planes iq1_s(const uint8_t *b, vec v) {
    planes t;
    const vec qh = shuffle(load16(b + 34), load(patterns.word_of_4)), two_bits = EACH(epi8, 3);
    t.w[0] = and(v, two_bits);
    t.w[1] = and(right16(v, 2), two_bits);
    t.w[2] = and(right16(v, 4), two_bits);
    t.w[3] = and(right16(v, 6), two_bits);
    scales_of(&t, qh, 4, &patterns.iq1_s);
    t.d = 0.125f * half(u16(b));
    return t;
}
PLANES(iq1_s, 50, without_signs, codes.iq1, 0, 2048)

static inline vec iq1_m_high(const uint8_t *b) {  // bits 9 to 11: of the index; bit 12: sign of the offset
    return multiply16(shuffle(load16(b + 32), load(patterns.byte_of_2)), load(patterns.nibbles));
}

static inline vec iq1_m_at(const uint8_t *b) {
    const vec low = load_words(b);
    return and_or(iq1_m_high(b), EACH(epi16, 0x0e00), add16(low, low));
}

static inline planes iq1_m(const uint8_t *b, vec v) {
    planes t;
    const vec plus = high_product(and_not(iq1_m_high(b), EACH(epi16, 0x1000)), EACH(epi16, 0x1010)), middle = EACH(epi8, 12);
    t.w[0] = and_or(left16(v, 2), middle, plus);
    t.w[1] = and_or(v, middle, plus);
    t.w[2] = and_or(right16(v, 2), middle, plus);
    t.w[3] = and_or(right16(v, 4), middle, plus);
    const uint64_t s = u64(b + 48);
    scales_of(&t, multiply16(shuffle(each64(s), load(patterns.word_of_8)), load(patterns.threes)), 3, &patterns.iq1_m);
    t.d = 0.125f * half((uint16_t)((s >> 12 & 0xf) | (s >> 24 & 0xf0) | (s >> 36 & 0xf00) | (s >> 48 & 0xf000)));
    return t;
}
PLANES(iq1_m, 56, without_signs, codes.iq1, 0, 2048)

// With signs: those of entry j in the lower byte of word j.

static inline void signed_levels(planes *t, vec v, vec signs) {
    const vec s = or(signs, left16(signs, 6)), levels = load16(patterns.levels);  // of each byte's weights: bits 0, 1, 4, 5
    const vec codes2 = EACH(epi8, 0x33), third = EACH(epi8, 0x44);
    const vec even = and_or(left16(s, 2), third, and(v, codes2));
    const vec odd = and_or(left16(s, 1), third, and(right16(v, 2), codes2));
    t->w[0] = shuffle(levels, even);
    t->w[1] = shuffle(levels, odd);
    t->w[2] = shuffle(levels, right16(even, 4));
    t->w[3] = shuffle(levels, right16(odd, 4));
}

static inline vec eighth(vec seven) {  // seven signs, and the eighth, which makes their number even
    const vec folded = and(xor(seven, right16(seven, 4)), EACH(epi16, 15));
    return or(seven, shuffle(load16(patterns.parity), or(folded, EACH(epi16, (int16_t)0x8000))));
}

static inline vec nibble_scales(const uint8_t *b) {  // 2 n + 1 of 16 nibbles
    const vec n = right_each(shuffle(each64(u64(b)), load(patterns.half_bytes)), load(patterns.zero_or_4));
    return and_or(add32(n, n), EACH(epi32, 30), EACH(epi32, 1));
}

static inline vec iq2_xxs_at(const uint8_t *b) { return placed(shuffle(load(b + 2), load(patterns.first_four)), 256); }

static inline planes iq2_xxs(const uint8_t *b, vec v) {
    planes t;
    const vec words = load(b + 2);  // of 32 weights: 4 entries, 4 x 7 signs, scale
#if defined(__AVX512VBMI__) && defined(__GFNI__)
    const vec sevens = _mm512_multishift_epi64_epi8(load(patterns.sevens), words);
    const vec signs = and(_mm512_gf2p8affine_epi64_epi8(sevens, each64(0x010204081020407f), 0), EACH(epi16, 255));
#else
    const vec sevens = multiply16(shuffle(words, load(patterns.sevens)), load(patterns.seven_bits));
    const vec signs = eighth(and(right16(sevens, 7), EACH(epi16, 127)));
#endif
    signed_levels(&t, v, signs);
    t.scale = and_or(right32(shuffle(words, load(patterns.last_byte)), 3), EACH(epi32, 30), EACH(epi32, 1));
    t.d = 0.125f * half(u16(b));
    return t;
}
PLANES(iq2_xxs, 66, with_signs, codes.iq2_xxs, codes.iq2_xxs_words, 256)

static inline vec iq2_xs_at(const uint8_t *b) { return placed(and(load(b + 2), EACH(epi16, 511)), 512); }

static inline planes iq2_xs(const uint8_t *b, vec v) {
    planes t;
    signed_levels(&t, v, eighth(right16(load(b + 2), 9)));
    t.scale = nibble_scales(b + 66);
    t.d = 0.125f * half(u16(b));
    return t;
}
PLANES(iq2_xs, 74, with_signs, codes.iq2_xs, codes.iq2_xs_words, 512)

static inline vec iq2_s_at(const uint8_t *b) {
    const vec low = load_words(b + 2), qh = shuffle(each64(u64(b + 66)), load(patterns.byte_of_4));
    return placed(and_or(multiply16(qh, load(patterns.two_bits)), EACH(epi16, 0x0300), low), 1024);
}

static inline planes iq2_s(const uint8_t *b, vec v) {
    planes t;
    signed_levels(&t, v, load_words(b + 34));
    t.scale = nibble_scales(b + 74);
    t.d = 0.125f * half(u16(b));
    return t;
}
PLANES(iq2_s, 82, with_signs, codes.iq2_s, codes.iq2_s_words, 1024)
