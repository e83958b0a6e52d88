// What the products share: rows of activations in 8 bits, and tables of the grids.
//
// A row of n (a multiple of 256) is quantized as ggml's q8_K: 256 numbers under one float d, and sums of 16 neighbours,
// which offsets of weights are multiplied by. Unlike ggml's blocks the 8-bit numbers lie together, on lines of the cache; and
// once more in four planes of 64, for codebooks.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SUPERBLOCK 256
#define MOST_ROWS 16  // of activations that a row of weights is multiplied by while its weights are decoded

static const int PLANE[] = {0, 1, 4, 5};  // a plane has of each eight numbers this one and the one after the next

typedef struct {
    int8_t *q, *planes;    // [n]
    int32_t *high, *less;  // [n / 16]: minus the sum, shifted left by 16 bits; -64 times the sum
    int16_t *sums;         // [n / 16]
    float *d;              // [n / 256]
} act_row;

static inline size_t act_bytes(int64_t n) { return (size_t)(2 * n + n / 2 + n / 8 + n / 64 + 63) / 64 * 64; }

static inline act_row act_at(const uint8_t *base, int64_t n) {
    int8_t *q = (int8_t *)base, *after = q + 2 * n;
    return (act_row){q, q + n, (int32_t *)after, (int32_t *)(after + n / 4), (int16_t *)(after + n / 2), (float *)(after + n / 2 + n / 8)};
}

// 256 numbers of a row that starts at `base`: as ggml's quantize_row_q8_K_ref, to the bit.
static void quantize_superblock(const float *x, uint8_t *base, int64_t n, int64_t block) {
    const act_row row = act_at(base, n);
    int8_t *q = row.q + SUPERBLOCK * block, *planes = row.planes + SUPERBLOCK * block;
    int16_t *sums = row.sums + SUPERBLOCK / 16 * block;
    int32_t *high = row.high + SUPERBLOCK / 16 * block, *less = row.less + SUPERBLOCK / 16 * block;
    float *d = row.d + block;
    int32_t bits[SUPERBLOCK], most = 0, first = SUPERBLOCK;
    memcpy(bits, x, sizeof bits);
    for (int i = 0; i < SUPERBLOCK; i++) bits[i] &= 0x7fffffff;  // magnitudes, which compare as integers do
    for (int i = 0; i < SUPERBLOCK; i++) most = bits[i] > most ? bits[i] : most;
    if (!most) {
        memset(q, 0, SUPERBLOCK);
        memset(planes, 0, SUPERBLOCK);
        memset(sums, 0, SUPERBLOCK / 8);
        memset(high, 0, SUPERBLOCK / 4);
        memset(less, 0, SUPERBLOCK / 4);
        *d = 0;
        return;
    }
    for (int i = 0; i < SUPERBLOCK; i++) {
        const int at = bits[i] == most ? i : SUPERBLOCK;
        first = at < first ? at : first;
    }
    const float inverse = -127.f / x[first];
    float shifted[SUPERBLOCK];
    for (int i = 0; i < SUPERBLOCK; i++) shifted[i] = inverse * x[i] + 12582912.f;  // rounds to the nearest, ties to even
    memcpy(bits, shifted, sizeof bits);
    for (int i = 0; i < SUPERBLOCK; i++) {
        const int v = (bits[i] & 0x7fffff) - 0x400000;
        q[i] = (int8_t)(v < 127 ? v : 127);
    }
    for (int g = 0; g < SUPERBLOCK / 16; g++) {
        int sum = 0;
        for (int i = 16 * g; i < 16 * g + 16; i++) sum += q[i];
        sums[g] = (int16_t)sum;
        high[g] = -sum * 65536;
        less[g] = -64 * sum;
    }
    for (int p = 0; p < 4; p++)
        for (int i = 0; i < SUPERBLOCK / 8; i++) {
            const int8_t *two = q + 8 * i + PLANE[p];
            planes[SUPERBLOCK / 4 * p + 2 * i] = two[0];
            planes[SUPERBLOCK / 4 * p + 2 * i + 1] = two[2];
        }
    *d = 1 / inverse;
}

static inline float half(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, low = bits & 0x7fff;
    union { uint32_t i; float f; } v = {low << 13};
    if (low >= 0x7c00) v.i += 0x70000000;       // not finite
    else if (low >= 0x400) v.i += 0x38000000;   // normal
    else v.f = (float)low * 0x1p-24f;           // subnormal
    v.i |= sign;
    return v.f;
#endif
}

static inline uint16_t u16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

static inline uint32_t u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static inline uint64_t u64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

// Scales and minima of Q4_K and Q5_K, 6 bits each: eight bytes of scales, then eight of minima.
static inline void six_bits(const uint8_t *s, uint64_t *scales, uint64_t *minima) {
    const uint32_t a = u32(s), b = u32(s + 4), c = u32(s + 8);
    const uint32_t low = 0x3f3f3f3f, nibble = 0x0f0f0f0f, pair = 0x03030303;
    *scales = (a & low) | (uint64_t)((c & nibble) | ((a >> 6 & pair) << 4)) << 32;
    *minima = (b & low) | (uint64_t)((c >> 4 & nibble) | ((b >> 6 & pair) << 4)) << 32;
}

// Q3_K's sixteen scales of 6 bits, 32 too large: two words of eight bytes.
static inline void q3_scales(const uint8_t *s, uint64_t *first, uint64_t *second) {
    const uint32_t a = u32(s), b = u32(s + 4), c = u32(s + 8), nibble = 0x0f0f0f0f, pair = 0x03030303;
    *first = (a & nibble) | (c & pair) << 4 | (uint64_t)((b & nibble) | (c >> 2 & pair) << 4) << 32;
    *second = (a >> 4 & nibble) | (c >> 4 & pair) << 4 | (uint64_t)((b >> 4 & nibble) | (c >> 6 & pair) << 4) << 32;
}
