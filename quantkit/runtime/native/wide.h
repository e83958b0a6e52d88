// 64 bytes as one register of AVX-512, or as two of AVX2: the same names for both, so that products are written once.
// Bytes are shuffled within 16 of them, as both do.
#pragma once
#include "rows.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define VNNI 1
#else
#define VNNI 0
#endif

#if defined(__AVX512F__)
typedef __m512i vec;
typedef __m512 floats;
#define OF_TWO(name, operation) \
    static inline vec name(vec x, vec y) { return _mm512_##operation(x, y); }
#define OF_NUMBER(name, operation) \
    static inline vec name(vec x, int n) { return _mm512_##operation(x, n); }
OF_TWO(and, and_si512)
OF_TWO(or, or_si512)
OF_TWO(xor, xor_si512)
OF_TWO(and_not, andnot_si512)  // the first inverted
#define EACH(x, at) _mm512_set1_##x(at)
static inline vec each64(uint64_t x) { return _mm512_set1_epi64((int64_t)x); }
static inline vec load(const void *p) { return _mm512_loadu_si512(p); }
static inline void store(void *p, vec x) { _mm512_storeu_si512(p, x); }
static inline vec load16(const void *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(p)); }  // four times
static inline vec load_words(const uint8_t *p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
static inline vec and_or(vec x, vec y, vec z) { return _mm512_ternarylogic_epi64(x, y, z, 0xea); }       // (x & y) | z
static inline floats zeros(void) { return _mm512_setzero_ps(); }
static inline floats add_scaled(vec x, float d, floats sum) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(d), sum); }
static inline __m256 halves(floats x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
#if VNNI
static inline vec fours(vec sum, vec u, vec q) { return _mm512_dpbusd_epi32(sum, u, q); }
static inline vec low_and_high(vec x, vec y) { return _mm512_mask_blend_epi16(0xaaaaaaaa, x, y); }  // words
#endif
#else
typedef struct { __m256i a, b; } vec;
typedef struct { __m256 a, b; } floats;
#define OF_TWO(name, operation) \
    static inline vec name(vec x, vec y) { return (vec){_mm256_##operation(x.a, y.a), _mm256_##operation(x.b, y.b)}; }
#define OF_NUMBER(name, operation) \
    static inline vec name(vec x, int n) { return (vec){_mm256_##operation(x.a, n), _mm256_##operation(x.b, n)}; }
OF_TWO(and, and_si256)
OF_TWO(or, or_si256)
OF_TWO(xor, xor_si256)
OF_TWO(and_not, andnot_si256)
#define EACH(x, at) ((vec){_mm256_set1_##x(at), _mm256_set1_##x(at)})
static inline vec each64(uint64_t x) { return (vec){_mm256_set1_epi64x((int64_t)x), _mm256_set1_epi64x((int64_t)x)}; }
static inline vec load(const void *p) { return (vec){_mm256_loadu_si256(p), _mm256_loadu_si256((const __m256i *)p + 1)}; }
static inline void store(void *p, vec x) {
    _mm256_storeu_si256(p, x.a);
    _mm256_storeu_si256((__m256i *)p + 1, x.b);
}

static inline vec load16(const void *p) {
    const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128(p));
    return (vec){v, v};
}
static inline vec load_words(const uint8_t *p) {
    return (vec){_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p + 1))};
}
static inline vec and_or(vec x, vec y, vec z) { return or(and(x, y), z); }
static inline floats zeros(void) { return (floats){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline floats add_scaled(vec x, float d, floats sum) {
    const __m256 f = _mm256_set1_ps(d);
    return (floats){_mm256_fmadd_ps(_mm256_cvtepi32_ps(x.a), f, sum.a), _mm256_fmadd_ps(_mm256_cvtepi32_ps(x.b), f, sum.b)};
}
static inline __m256 halves(floats x) { return _mm256_add_ps(x.a, x.b); }
#if VNNI
static inline vec fours(vec sum, vec u, vec q) {
    return (vec){_mm256_dpbusd_avx_epi32(sum.a, u.a, q.a), _mm256_dpbusd_avx_epi32(sum.b, u.b, q.b)};
}
static inline vec low_and_high(vec x, vec y) { return (vec){_mm256_blend_epi16(x.a, y.a, 0xaa), _mm256_blend_epi16(x.b, y.b, 0xaa)}; }
#endif
#endif

OF_TWO(add16, add_epi16)
OF_TWO(add32, add_epi32)
OF_TWO(multiply16, mullo_epi16)
OF_TWO(multiply32, mullo_epi32)
OF_TWO(high_product, mulhi_epu16)
OF_TWO(add_products, madd_epi16)         // of two neighbouring words
OF_TWO(add_byte_products, maddubs_epi16)  // of two neighbouring bytes, the first without signs
OF_TWO(shuffle, shuffle_epi8)
OF_TWO(right_each, srlv_epi32)
OF_NUMBER(left16, slli_epi16)
OF_NUMBER(right16, srli_epi16)
OF_NUMBER(right32, srli_epi32)
#if !VNNI
static inline vec fours(vec sum, vec u, vec q) {  // pairs fit 16 bits
    return add32(sum, add_products(add_byte_products(u, q), EACH(epi16, 1)));
}
#endif

static inline float total8(__m256 v) {
    __m128 u = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    u = _mm_add_ps(u, _mm_movehl_ps(u, u));
    return _mm_cvtss_f32(_mm_add_ss(u, _mm_movehdup_ps(u)));
}

#define AHEAD 2048  // bytes of weights that are asked for before they are needed

// Ask for `bytes` of weights at p, or beyond their end for those that are read afterwards, `jump` further on. (Unless it is
// inlined early, gcc drops calls of a function that only prefetches.)
static inline __attribute__((always_inline)) void prefetch(const uint8_t *p, const uint8_t *end, int64_t jump, int bytes) {
    p += p < end ? 0 : jump;
    for (int c = 0; c < bytes; c += 64) _mm_prefetch((const char *)p + c, _MM_HINT_T0);
}
