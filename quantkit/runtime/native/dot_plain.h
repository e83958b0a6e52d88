// Products of packed rows with 8-bit activations, for processors without the instructions of dot_avx512.h: 256 weights
// are decoded to memory in plain C (with AVX2 vectorized by the compiler), and multiplied from there.
#pragma once
#include "rows.h"

typedef struct {
    _Alignas(64) uint8_t w[SUPERBLOCK];
    uint8_t minus[SUPERBLOCK / 8];  // a bit for each weight that is negative
    int16_t scale[16], offset[16];  // of 16 weights each
    float d, d_offset;
} tile;

enum { NO_OFFSET, SAME_D, OWN_D };

typedef struct {
    float main[8], offset;
} sums;

#if defined(__AVX2__)
static inline __m256i sign_mask(uint32_t bits) {  // 0 or -1 for each of 32 weights
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0));
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
}
#endif

static inline void add_tile(sums *s, const tile *t, act_row y, int64_t b, int has_signs, int has_offset) {
    const int8_t *q = y.q + SUPERBLOCK * b;
    int32_t lanes[8] = {0};
#if defined(__AVX2__)
    __m256i sum = _mm256_setzero_si256();
    for (int g = 0; g < 8; g++) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(q + 32 * g));
        if (has_signs) {
            const __m256i mask = sign_mask(u32(t->minus + 4 * g));
            v = _mm256_sub_epi8(_mm256_xor_si256(v, mask), mask);
        }
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_load_si256((const __m256i *)(t->w + 32 * g)), v);
        const __m256i scale = _mm256_inserti128_si256(_mm256_set1_epi16(t->scale[2 * g]), _mm_set1_epi16(t->scale[2 * g + 1]), 1);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, scale));
    }
    _mm256_storeu_si256((__m256i *)lanes, sum);
#else
    int8_t turned[SUPERBLOCK];
    if (has_signs) {
        for (int i = 0; i < SUPERBLOCK; i++) turned[i] = (int8_t)(t->minus[i / 8] >> i % 8 & 1 ? -q[i] : q[i]);
        q = turned;
    }
    for (int g = 0; g < 16; g++) {
        int32_t sum = 0;
        for (int i = 16 * g; i < 16 * g + 16; i++) sum += t->w[i] * q[i];
        lanes[g / 2] += t->scale[g] * sum;
    }
#endif
    const float d = t->d * y.d[b];
    for (int i = 0; i < 8; i++) s->main[i] += d * (float)lanes[i];
    if (has_offset) {
        int32_t o = 0;
        for (int g = 0; g < 16; g++) o += t->offset[g] * y.sums[16 * b + g];
        s->offset += (has_offset == OWN_D ? t->d_offset * y.d[b] : d) * (float)o;
    }
}

static inline float total(const sums *s) {
    const float *v = s->main;
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])) + s->offset;
}

// row: packed weights of n_blocks superblocks; m rows of activations; out: m products.
#define DOT(name, bytes, has_signs, has_offset)                                                          \
    static void dot_##name(const uint8_t *row, int64_t n_blocks, const act_row *y, int m, float *out) { \
        sums s[MOST_ROWS];                                                                               \
        memset(s, 0, sizeof(sums) * (size_t)m);                                                          \
        for (int64_t b = 0; b < n_blocks; b++, row += bytes) {                                           \
            tile t;                                                                                      \
            name(row, &t);                                                                               \
            for (int i = 0; i < m; i++) add_tile(s + i, &t, y[i], b, has_signs, has_offset);             \
        }                                                                                                \
        for (int i = 0; i < m; i++) out[i] = total(s + i);                                               \
    }

// Codebooks

static inline void iq1_s(const uint8_t *b, tile *t) {
    for (int g = 0; g < 8; g++) {
        const int qh = u16(b + 34 + 2 * g), scale = (qh >> 11 & 14) + 1;
        for (int l = 0; l < 4; l++) memcpy(t->w + 32 * g + 8 * l, grids.iq1 + (b[2 + 4 * g + l] | (qh >> 3 * l & 7) << 8), 8);
        t->scale[2 * g] = t->scale[2 * g + 1] = (int16_t)scale;
        t->offset[2 * g] = t->offset[2 * g + 1] = (int16_t)(scale * (qh & 0x8000 ? -9 : -7));
    }
    t->d = 0.125f * half(u16(b));
}
DOT(iq1_s, 50, 0, SAME_D)

static inline void iq1_m(const uint8_t *b, tile *t) {
    const uint64_t s = u64(b + 48);
    for (int g = 0; g < 16; g++) {
        const int qh = b[32 + g], scale = 2 * (int)(s >> (16 * (g / 4) + 3 * (g % 4)) & 7) + 1;
        for (int l = 0; l < 2; l++) {
            const int high = qh >> 4 * l & 15;
            const uint64_t v = grids.iq1[b[2 * g + l] | (high & 7) << 8] + (high & 8 ? 0 : 0x0202020202020202);
            memcpy(t->w + 16 * g + 8 * l, &v, 8);
        }
        t->scale[g] = (int16_t)scale;
        t->offset[g] = (int16_t)(-9 * scale);
    }
    t->d = 0.125f * half((uint16_t)((s >> 12 & 0xf) | (s >> 24 & 0xf0) | (s >> 36 & 0xf00) | (s >> 48 & 0xf000)));
}
DOT(iq1_m, 56, 0, SAME_D)

static inline void iq2_xxs(const uint8_t *b, tile *t) {
    for (int g = 0; g < 8; g++) {
        const uint32_t signs = u32(b + 6 + 8 * g);
        for (int l = 0; l < 4; l++) {
            memcpy(t->w + 32 * g + 8 * l, grids.iq2_xxs + b[2 + 8 * g + l], 8);
            t->minus[4 * g + l] = grids.even[signs >> 7 * l & 127];
        }
        t->scale[2 * g] = t->scale[2 * g + 1] = (int16_t)(2 * (signs >> 28) + 1);
    }
    t->d = 0.125f * half(u16(b));
}
DOT(iq2_xxs, 66, 1, NO_OFFSET)

static inline void iq2_xs(const uint8_t *b, tile *t) {
    for (int l = 0; l < 32; l++) {
        const uint16_t v = u16(b + 2 + 2 * l);
        memcpy(t->w + 8 * l, grids.iq2_xs + (v & 511), 8);
        t->minus[l] = grids.even[v >> 9];
    }
    for (int g = 0; g < 16; g++) t->scale[g] = (int16_t)(2 * (b[66 + g / 2] >> 4 * (g % 2) & 15) + 1);
    t->d = 0.125f * half(u16(b));
}
DOT(iq2_xs, 74, 1, NO_OFFSET)

static inline void iq2_s(const uint8_t *b, tile *t) {
    for (int l = 0; l < 32; l++) {
        memcpy(t->w + 8 * l, grids.iq2_s + (b[2 + l] | (b[66 + l / 4] >> 2 * (l % 4) & 3) << 8), 8);
        t->minus[l] = b[34 + l];
    }
    for (int g = 0; g < 16; g++) t->scale[g] = (int16_t)(2 * (b[74 + g / 2] >> 4 * (g % 2) & 15) + 1);
    t->d = 0.125f * half(u16(b));
}
DOT(iq2_s, 82, 1, NO_OFFSET)

// k-quants

static inline void q2_k(const uint8_t *b, tile *t) {
    for (int n = 0; n < 2; n++)
        for (int j = 0; j < 4; j++)
            for (int l = 0; l < 32; l++) t->w[128 * n + 32 * j + l] = b[16 + 32 * n + l] >> 2 * j & 3;
    for (int g = 0; g < 16; g++) {
        t->scale[g] = b[g] & 15;
        t->offset[g] = b[g] >> 4;
    }
    t->d = half(u16(b + 80));
    t->d_offset = -half(u16(b + 82));
}
DOT(q2_k, 84, 0, OWN_D)

static inline void q3_k(const uint8_t *b, tile *t) {
    for (int n = 0; n < 2; n++)
        for (int j = 0; j < 4; j++)
            for (int l = 0; l < 32; l++)
                t->w[128 * n + 32 * j + l] = (uint8_t)((b[32 + 32 * n + l] >> 2 * j & 3) | (b[l] >> (4 * n + j) & 1) << 2);
    uint64_t words[2];
    q3_scales(b + 96, words, words + 1);
    for (int g = 0; g < 16; g++) {
        t->scale[g] = (int16_t)((int)(words[g / 8] >> 8 * (g % 8) & 255) - 32);
        t->offset[g] = (int16_t)(-4 * t->scale[g]);
    }
    t->d = half(u16(b + 108));
}
DOT(q3_k, 110, 0, SAME_D)

static inline void q4_scales(const uint8_t *b, tile *t) {
    uint64_t scales, minima;
    six_bits(b + 4, &scales, &minima);
    for (int g = 0; g < 16; g++) {
        t->scale[g] = (int16_t)(scales >> 8 * (g / 2) & 255);
        t->offset[g] = (int16_t)(minima >> 8 * (g / 2) & 255);
    }
    t->d = half(u16(b));
    t->d_offset = -half(u16(b + 2));
}

static inline void q4_k(const uint8_t *b, tile *t) {
    for (int k = 0; k < 8; k++)
        for (int l = 0; l < 32; l++) t->w[32 * k + l] = b[16 + 32 * (k / 2) + l] >> 4 * (k % 2) & 15;
    q4_scales(b, t);
}
DOT(q4_k, 144, 0, OWN_D)

static inline void q5_k(const uint8_t *b, tile *t) {
    for (int k = 0; k < 8; k++)
        for (int l = 0; l < 32; l++)
            t->w[32 * k + l] = (uint8_t)((b[48 + 32 * (k / 2) + l] >> 4 * (k % 2) & 15) | (b[16 + l] >> k & 1) << 4);
    q4_scales(b, t);
}
DOT(q5_k, 176, 0, OWN_D)

static inline void q6_k(const uint8_t *b, tile *t) {
    for (int k = 0; k < 8; k++) {
        const int n = k / 4, j = k % 4;
        for (int l = 0; l < 32; l++)
            t->w[32 * k + l] = (uint8_t)((b[64 * n + 32 * (j % 2) + l] >> 4 * (j / 2) & 15) | (b[128 + 32 * n + l] >> 2 * j & 3) << 4);
    }
    for (int g = 0; g < 16; g++) {
        t->scale[g] = (int8_t)b[192 + g];
        t->offset[g] = (int16_t)(-32 * t->scale[g]);
    }
    t->d = half(u16(b + 208));
}
DOT(q6_k, 210, 0, SAME_D)
