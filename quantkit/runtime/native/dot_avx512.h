// Products of packed rows with 8-bit activations by AVX-512, with VNNI where there is: Skylake, Zen 4 and later.
//
// 256 weights are decoded to bytes u in registers, so that a weight is d (scale u) - offset, and its sign for types that
// have signs apart. Sums of four products fit 16 bits in every type, so two registers of them become one, and another
// instruction multiplies by 16-bit scales; a superblock is exact in integers, as in ggml.
#pragma once
#include "rows.h"

typedef struct {
    __m512i w[4];
    __mmask64 minus[4];    // weights that are negative
    __m256i scale, offset;  // int16 of 16 weights each
    float d, d_offset;
} tile;

enum { NO_OFFSET, SAME_D, OWN_D };

static inline __m512i fours(__m512i u, __m512i q) {  // sums of four products of bytes, the first without signs
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), u, q);
#else
    return _mm512_madd_epi16(_mm512_maddubs_epi16(u, q), _mm512_set1_epi16(1));
#endif
}

static inline __m512i add_pairs(__m512i sum, __m512i a, __m512i b) {  // of products of 16-bit numbers
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

// Eight entries of a grid, by two words of four 16-bit indices. Three ways, as fast as each other or not by processor.
#if !defined(LOOKUP)
#define LOOKUP 1
#endif
#if LOOKUP == 0  // gathered
static inline __m512i eight(const uint64_t *grid, uint64_t a, uint64_t b) {
    return _mm512_i64gather_epi64(_mm512_cvtepu16_epi64(_mm_set_epi64x((int64_t)b, (int64_t)a)), grid, 8);
}
#elif LOOKUP == 1  // pairs, put together
static inline __m256i four(const uint64_t *grid, uint64_t i) {
    const uint64_t *a = grid + (uint16_t)i, *b = grid + (uint16_t)(i >> 16), *c = grid + (uint16_t)(i >> 32), *d = grid + (i >> 48);
    const __m128 low = _mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)a)), (const __m64 *)b);
    const __m128 high = _mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)c)), (const __m64 *)d);
    return _mm256_castps_si256(_mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1));
}
static inline __m512i eight(const uint64_t *grid, uint64_t a, uint64_t b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(four(grid, a)), four(grid, b), 1);
}
#else  // each load writes its own lane
static inline __m512i eight(const uint64_t *grid, uint64_t a, uint64_t b) {
    __m512i v = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)(grid + (uint16_t)a)));
#define LANE(k, at) __asm__("vpbroadcastq %2, %0%{%1%}" : "+v"(v) : "Yk"((__mmask8)(1 << k)), "m"(grid[at]))
    LANE(1, (uint16_t)(a >> 16)); LANE(2, (uint16_t)(a >> 32)); LANE(3, a >> 48);
    LANE(4, (uint16_t)b); LANE(5, (uint16_t)(b >> 16)); LANE(6, (uint16_t)(b >> 32)); LANE(7, b >> 48);
    return v;
}
#endif
#define BYTES4 0x00ff00ff00ff00ff

// Four indices into a grid, 16 bits each: their low bytes, and the bits above as `where` says.
static inline uint64_t indices(const uint8_t *low, uint64_t high, uint64_t where) {
    return _pdep_u64(u32(low), BYTES4) | _pdep_u64(high, where);
}

// A number of each group of 16 weights to the lanes of `packs` of two registers with 64 weights each.
static inline __m512i first_half(__m256i scale) {
    const __m512i at = _mm512_set_epi16(7, 7, 7, 7, 3, 3, 3, 3, 6, 6, 6, 6, 2, 2, 2, 2, 5, 5, 5, 5, 1, 1, 1, 1, 4, 4, 4, 4, 0, 0, 0, 0);
    return _mm512_permutexvar_epi16(at, _mm512_castsi256_si512(scale));
}

static inline __m512i second_half(__m256i scale) {
    const __m512i at = _mm512_set_epi16(15, 15, 15, 15, 11, 11, 11, 11, 14, 14, 14, 14, 10, 10, 10, 10, 13, 13, 13, 13, 9, 9, 9, 9, 12, 12, 12, 12, 8, 8, 8, 8);
    return _mm512_permutexvar_epi16(at, _mm512_castsi256_si512(scale));
}

typedef struct {
    __m512 main;
    __m256 offset;
} sums;

static inline __attribute__((always_inline)) void add_tile(sums *s, const tile *t, act_row y, int64_t b, int has_signs, int has_offset) {
    __m512i p[4];
    for (int k = 0; k < 4; k++) {
        __m512i q = _mm512_loadu_si512(y.q + SUPERBLOCK * b + 64 * k);
        if (has_signs) q = _mm512_mask_sub_epi8(q, t->minus[k], _mm512_setzero_si512(), q);
        p[k] = fours(t->w[k], q);
    }
    __m512i sum = _mm512_madd_epi16(_mm512_packs_epi32(p[0], p[1]), first_half(t->scale));
    sum = add_pairs(sum, _mm512_packs_epi32(p[2], p[3]), second_half(t->scale));
    if (has_offset) {
        const __m256i o = _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)(y.sums + 16 * b)), t->offset);
        if (has_offset == SAME_D) sum = _mm512_add_epi32(sum, _mm512_zextsi256_si512(o));
        else s->offset = _mm256_fmadd_ps(_mm256_cvtepi32_ps(o), _mm256_set1_ps(t->d_offset * y.d[b]), s->offset);
    }
    s->main = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(t->d * y.d[b]), s->main);
}

static inline float total(const sums *s, int has_offset) {
    __m256 v = _mm256_add_ps(_mm512_castps512_ps256(s->main), _mm512_extractf32x8_ps(s->main, 1));
    if (has_offset == OWN_D) v = _mm256_add_ps(v, s->offset);
    __m128 u = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    u = _mm_add_ps(u, _mm_movehl_ps(u, u));
    return _mm_cvtss_f32(_mm_add_ss(u, _mm_movehdup_ps(u)));
}

#define AHEAD 1024  // bytes of weights that are asked for before they are needed

// row: packed weights of n_blocks superblocks; m rows of activations; out: m products.
#define DOT(name, bytes, has_signs, has_offset)                                                      \
    static void dot_##name(const uint8_t *row, int64_t n_blocks, const act_row *y, int m, float *out) { \
        if (m == 1) {                                                                                \
            sums s = {_mm512_setzero_ps(), _mm256_setzero_ps()};                                     \
            for (int64_t b = 0; b < n_blocks; b++, row += bytes) {                                   \
                for (int c = 0; c < bytes; c += 64) _mm_prefetch((const char *)row + AHEAD + c, _MM_HINT_T0); \
                const tile t = name(row);                                                            \
                add_tile(&s, &t, y[0], b, has_signs, has_offset);                                    \
            }                                                                                        \
            out[0] = total(&s, has_offset);                                                          \
            return;                                                                                  \
        }                                                                                            \
        sums s[MOST_ROWS];                                                                           \
        for (int i = 0; i < m; i++) s[i] = (sums){_mm512_setzero_ps(), _mm256_setzero_ps()};         \
        for (int64_t b = 0; b < n_blocks; b++, row += bytes) {                                       \
            for (int c = 0; c < bytes; c += 64) _mm_prefetch((const char *)row + AHEAD + c, _MM_HINT_T0); \
            const tile t = name(row);                                                                \
            for (int i = 0; i < m; i++) add_tile(s + i, &t, y[i], b, has_signs, has_offset);         \
        }                                                                                            \
        for (int i = 0; i < m; i++) out[i] = total(s + i, has_offset);                               \
    }

// Codebooks

static inline __m256i twice(__m128i eight16) {  // one number of 32 weights -> of 16 each
    const __m256i at = _mm256_set_epi16(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm256_permutexvar_epi16(at, _mm256_castsi128_si256(eight16));
}

static inline __m256i odd(__m256i v) { return _mm256_or_si256(_mm256_slli_epi16(v, 1), _mm256_set1_epi16(1)); }

static inline tile iq1_s(const uint8_t *b) {
    tile t;
    const __m128i words = _mm_loadu_si128((const __m128i *)(b + 34));
    for (int k = 0; k < 4; k++) {
        uint64_t at[2];
        for (int i = 0; i < 2; i++)
            at[i] = indices(b + 2 + 8 * k + 4 * i, u16(b + 34 + 4 * k + 2 * i), 0x0700070007000700);
        t.w[k] = eight(grids.iq1, at[0], at[1]);
    }
    const __m256i qh = twice(words);
    t.scale = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(qh, 11), _mm256_set1_epi16(14)), _mm256_set1_epi16(1));
    const __m256i shift = _mm256_or_si256(_mm256_srai_epi16(qh, 15), _mm256_set1_epi16(1));
    t.offset = _mm256_mullo_epi16(t.scale, _mm256_sub_epi16(shift, _mm256_set1_epi16(8)));
    t.d = 0.125f * half(u16(b));
    return t;
}
DOT(iq1_s, 50, 0, SAME_D)

static inline tile iq1_m(const uint8_t *b) {
    tile t;
    for (int k = 0; k < 4; k++) {
        uint64_t at[2];
        const uint32_t high = u32(b + 32 + 4 * k);
        for (int i = 0; i < 2; i++)
            at[i] = indices(b + 8 * k + 4 * i, _pext_u64(high >> 16 * i, 0x7777), 0x0700070007000700);
        const __m512i v = eight(grids.iq1, at[0], at[1]);
        t.w[k] = _mm512_mask_add_epi64(v, (__mmask8)_pext_u64(~high, 0x88888888), v, _mm512_set1_epi8(2));
    }
    const uint64_t s = u64(b + 48);
    const __m256i four = _mm256_set_epi16(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m256i spread = _mm256_permutexvar_epi16(four, _mm256_set1_epi64x((int64_t)s));
    const __m256i three = _mm256_srlv_epi16(spread, _mm256_set1_epi64x(0x0009000600030000));
    t.scale = odd(_mm256_and_si256(three, _mm256_set1_epi16(7)));
    t.offset = _mm256_mullo_epi16(t.scale, _mm256_set1_epi16(-9));
    t.d = 0.125f * half((uint16_t)((s >> 12 & 0xf) | (s >> 24 & 0xf0) | (s >> 36 & 0xf00) | (s >> 48 & 0xf000)));
    return t;
}
DOT(iq1_m, 56, 0, SAME_D)

static inline void seven_signs(tile *t, __m256i v) {  // seven bits of each byte; the eighth makes their number even
    const __m256i parity = _mm256_broadcastsi128_si256(_mm_set_epi64x((int64_t)0x0080800080000080, (int64_t)0x8000008000808000));
    v = _mm256_and_si256(v, _mm256_set1_epi8(127));
    const __m256i folded = _mm256_xor_si256(v, _mm256_srli_epi16(v, 4));
    const __m256i eights = _mm256_or_si256(v, _mm256_shuffle_epi8(parity, _mm256_and_si256(folded, _mm256_set1_epi8(15))));
    const __m128i high2 = _mm256_extracti128_si256(eights, 1), low2 = _mm256_castsi256_si128(eights);
    t->minus[0] = (uint64_t)_mm_cvtsi128_si64(low2);
    t->minus[1] = (uint64_t)_mm_extract_epi64(low2, 1);
    t->minus[2] = (uint64_t)_mm_cvtsi128_si64(high2);
    t->minus[3] = (uint64_t)_mm_extract_epi64(high2, 1);
}

static inline tile iq2_xxs(const uint8_t *b) {
    tile t;
    const __m512i words = _mm512_loadu_si512(b + 2);  // of 32 weights: 4 entries, 4 x 7 signs, scale
    for (int k = 0; k < 4; k++)
        t.w[k] = eight(grids.iq2_xxs, _pdep_u64(u32(b + 2 + 16 * k), BYTES4), _pdep_u64(u32(b + 10 + 16 * k), BYTES4));
#if defined(__AVX512VBMI__)
    const __m512i windows = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x352e2720), words);
#else
    const __m512i v = _mm512_srli_epi64(words, 32);
    __m512i windows = _mm512_and_si512(v, _mm512_set1_epi64(0x7f));
    windows = _mm512_ternarylogic_epi64(windows, _mm512_slli_epi64(v, 1), _mm512_set1_epi64(0x7f00), 0xf8);
    windows = _mm512_ternarylogic_epi64(windows, _mm512_slli_epi64(v, 2), _mm512_set1_epi64(0x7f0000), 0xf8);
    windows = _mm512_ternarylogic_epi64(windows, _mm512_slli_epi64(v, 3), _mm512_set1_epi64(0x7f000000), 0xf8);
#endif
    seven_signs(&t, _mm512_cvtepi64_epi32(windows));
    t.scale = odd(twice(_mm512_cvtepi64_epi16(_mm512_srli_epi64(words, 60))));
    t.d = 0.125f * half(u16(b));
    return t;
}
DOT(iq2_xxs, 66, 1, NO_OFFSET)

static inline __m256i nibbles(uint64_t s) {  // 16 of them, the low one of each byte first
    const __m128i v = _mm_cvtsi64_si128((int64_t)s), low = _mm_set1_epi8(15);
    return _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(_mm_and_si128(v, low), _mm_and_si128(_mm_srli_epi16(v, 4), low)));
}

static inline tile iq2_xs(const uint8_t *b) {
    tile t;
    const __m512i words = _mm512_loadu_si512(b + 2);
    const uint64_t low = 0x01ff01ff01ff01ff;
    for (int k = 0; k < 4; k++) t.w[k] = eight(grids.iq2_xs, u64(b + 2 + 16 * k) & low, u64(b + 10 + 16 * k) & low);
    seven_signs(&t, _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 9)));
    t.scale = odd(nibbles(u64(b + 66)));
    t.d = 0.125f * half(u16(b));
    return t;
}
DOT(iq2_xs, 74, 1, NO_OFFSET)

static inline tile iq2_s(const uint8_t *b) {
    tile t;
    for (int k = 0; k < 4; k++) {
        uint64_t at[2];
        for (int i = 0; i < 2; i++)
            at[i] = indices(b + 2 + 8 * k + 4 * i, b[66 + 2 * k + i], 0x0300030003000300);
        t.w[k] = eight(grids.iq2_s, at[0], at[1]);
        t.minus[k] = u64(b + 34 + 8 * k);
    }
    t.scale = odd(nibbles(u64(b + 74)));
    t.d = 0.125f * half(u16(b));
    return t;
}
DOT(iq2_s, 82, 1, NO_OFFSET)

// k-quants

static inline __m512i both(const uint8_t *p) { return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p)); }

static inline __m512i by(int low, int high) {  // shifts of the lower and of the upper 32 weights
    return _mm512_inserti64x4(_mm512_set1_epi16((short)low), _mm256_set1_epi16((short)high), 1);
}

static inline tile q2_k(const uint8_t *b) {
    tile t;
    for (int k = 0; k < 4; k++) {
        const __m512i v = _mm512_srlv_epi16(both(b + 16 + k / 2 * 32), k % 2 ? by(4, 6) : by(0, 2));
        t.w[k] = _mm512_and_si512(v, _mm512_set1_epi8(3));
    }
    const __m256i s = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)b));
    t.scale = _mm256_and_si256(s, _mm256_set1_epi16(15));
    t.offset = _mm256_srli_epi16(s, 4);
    t.d = half(u16(b + 80));
    t.d_offset = -half(u16(b + 82));
    return t;
}
DOT(q2_k, 84, 0, OWN_D)

static inline tile q3_k(const uint8_t *b) {
    tile t;
    const __m512i mask = both(b);
    for (int k = 0; k < 4; k++) {
        const __m512i v = _mm512_srlv_epi16(both(b + 32 + k / 2 * 32), k % 2 ? by(4, 6) : by(0, 2));
        const __m512i high = _mm512_slli_epi16(_mm512_srlv_epi16(mask, by(2 * k, 2 * k + 1)), 2);
        const __m512i four = _mm512_and_si512(high, _mm512_set1_epi8(4));
        t.w[k] = _mm512_ternarylogic_epi64(four, v, _mm512_set1_epi8(3), 0xf8);
    }
    uint64_t first, second;
    q3_scales(b + 96, &first, &second);
    const __m128i s = _mm_sub_epi8(_mm_set_epi64x((int64_t)second, (int64_t)first), _mm_set1_epi8(32));
    t.scale = _mm256_cvtepi8_epi16(s);
    t.offset = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), t.scale), 2);
    t.d = half(u16(b + 108));
    return t;
}
DOT(q3_k, 110, 0, SAME_D)

static inline void q4_scales(tile *t, const uint8_t *b) {
    uint64_t scales, minima;
    six_bits(b + 4, &scales, &minima);
    t->scale = twice(_mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t)scales)));
    t->offset = twice(_mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t)minima)));
    t->d = half(u16(b));
    t->d_offset = -half(u16(b + 2));
}

static inline tile q4_k(const uint8_t *b) {
    tile t;
    for (int k = 0; k < 4; k++)
        t.w[k] = _mm512_and_si512(_mm512_srlv_epi16(both(b + 16 + 32 * k), by(0, 4)), _mm512_set1_epi8(15));
    q4_scales(&t, b);
    return t;
}
DOT(q4_k, 144, 0, OWN_D)

static inline tile q5_k(const uint8_t *b) {
    tile t;
    const __m512i mask = both(b + 16);
    for (int k = 0; k < 4; k++) {
        const __m512i v = _mm512_srlv_epi16(both(b + 48 + 32 * k), by(0, 4));
        const __m512i high = _mm512_slli_epi16(_mm512_srlv_epi16(mask, by(2 * k, 2 * k + 1)), 4);
        const __m512i fifth = _mm512_and_si512(high, _mm512_set1_epi8(16));
        t.w[k] = _mm512_ternarylogic_epi64(fifth, v, _mm512_set1_epi8(15), 0xf8);
    }
    q4_scales(&t, b);
    return t;
}
DOT(q5_k, 176, 0, OWN_D)

static inline tile q6_k(const uint8_t *b) {
    tile t;
    for (int k = 0; k < 4; k++) {
        __m512i v = _mm512_loadu_si512(b + 64 * (k / 2));
        if (k % 2) v = _mm512_srli_epi16(v, 4);
        const __m512i pair = _mm512_srlv_epi16(both(b + 128 + 32 * (k / 2)), k % 2 ? by(4, 6) : by(0, 2));
        const __m512i high = _mm512_and_si512(_mm512_slli_epi16(pair, 4), _mm512_set1_epi8(0x30));
        t.w[k] = _mm512_ternarylogic_epi64(high, v, _mm512_set1_epi8(15), 0xf8);
    }
    t.scale = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(b + 192)));
    t.offset = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_setzero_si256(), t.scale), 5);
    t.d = half(u16(b + 208));
    return t;
}
DOT(q6_k, 210, 0, SAME_D)
