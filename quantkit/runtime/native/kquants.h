// Products of k-quants with 8-bit activations by AVX-512, with VNNI where there is: Skylake, Zen 4 and later.
//
// 256 weights are decoded to bytes u in registers, so that a weight is d (scale u) - offset. Sums of four products fit 16
// bits in every type, so two registers of them become one, and another instruction multiplies by 16-bit scales; a superblock
// is exact in integers, as in ggml.
#pragma once
#include "wide.h"

typedef struct {
    __m512i w[4];
    __m256i scale, offset;  // int16 of 16 weights each
    float d, d_offset;
} tile;

enum { SAME_D, OWN_D };

static inline __m512i add_pairs(__m512i sum, __m512i a, __m512i b) {  // of products of 16-bit numbers
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
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

static inline __attribute__((always_inline)) void add_tile(sums *s, const tile *t, act_row y, int64_t b, int offset) {
    __m512i p[4];
    for (int k = 0; k < 4; k++) p[k] = fours(_mm512_setzero_si512(), t->w[k], load(y.q + SUPERBLOCK * b + 64 * k));
    __m512i sum = _mm512_madd_epi16(_mm512_packs_epi32(p[0], p[1]), first_half(t->scale));
    sum = add_pairs(sum, _mm512_packs_epi32(p[2], p[3]), second_half(t->scale));
    const __m256i o = _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)(y.sums + 16 * b)), t->offset);
    if (offset == SAME_D) sum = _mm512_add_epi32(sum, _mm512_zextsi256_si512(o));
    else s->offset = _mm256_fmadd_ps(_mm256_cvtepi32_ps(o), _mm256_set1_ps(t->d_offset * y.d[b]), s->offset);
    s->main = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(t->d * y.d[b]), s->main);
}

static inline float total_of(const sums *s, int offset) {
    const __m256 v = halves(s->main);
    return total8(offset == OWN_D ? _mm256_add_ps(v, s->offset) : v);
}

// n_rows rows of n_blocks superblocks, one after the other; m rows of activations, whose sums stay in registers where m is a
// constant; out: n_rows x m products; then: what is read afterwards.
static inline __attribute__((always_inline)) void dot_tiles(
    const uint8_t *row, int bytes, int64_t n_rows, int64_t n_blocks, const act_row *y, int m, float *out, const uint8_t *then,
    tile (*decode)(const uint8_t *), int offset) {
    const uint8_t *const end = row + bytes * n_blocks * n_rows;
    const int64_t jump = then - end;
    for (int64_t r = 0; r < n_rows; r++, out += m) {
        sums s[MOST_ROWS];
        for (int i = 0; i < m; i++) s[i] = (sums){_mm512_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t b = 0; b < n_blocks; b++, row += bytes) {
            prefetch(row + AHEAD, end, jump, bytes);
            const tile t = decode(row);
            for (int i = 0; i < m; i++) add_tile(s + i, &t, y[i], b, offset);
        }
        for (int i = 0; i < m; i++) out[i] = total_of(s + i, offset);
    }
}

#define DOT(name, bytes, offset)                                                                     \
    static void dot_##name(const uint8_t *rows, int64_t n_rows, int64_t n_blocks, const act_row *y, int m, float *out, const uint8_t *then) { \
        switch (m) {                                                                                 \
            case 1: dot_tiles(rows, bytes, n_rows, n_blocks, y, 1, out, then, name, offset); return; \
            case 2: dot_tiles(rows, bytes, n_rows, n_blocks, y, 2, out, then, name, offset); return; \
            case 3: dot_tiles(rows, bytes, n_rows, n_blocks, y, 3, out, then, name, offset); return; \
            case 4: dot_tiles(rows, bytes, n_rows, n_blocks, y, 4, out, then, name, offset); return; \
            default: dot_tiles(rows, bytes, n_rows, n_blocks, y, m, out, then, name, offset);        \
        }                                                                                            \
    }

// k-quants

static inline __m256i twice(__m128i eight16) {  // one number of 32 weights -> of 16 each
    const __m256i at = _mm256_set_epi16(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm256_permutexvar_epi16(at, _mm256_castsi128_si256(eight16));
}

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
DOT(q2_k, 84, OWN_D)

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
DOT(q3_k, 110, SAME_D)

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
DOT(q4_k, 144, OWN_D)

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
DOT(q5_k, 176, OWN_D)

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
DOT(q6_k, 210, SAME_D)
