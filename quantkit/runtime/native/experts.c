// Routed experts of few tokens from their packed bytes. See library.py for how it is compiled, checked and called.
#define _GNU_SOURCE
#include "rows.h"

typedef void (*dot_function)(const uint8_t *, int64_t, const act_row *, int, float *);

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__BMI2__)
#include "dot_avx512.h"
#if defined(__AVX512VNNI__)
#define KERNELS "AVX-512 VNNI"
#else
#define KERNELS "AVX-512"
#endif

static dot_function own_dot(int type) {  // enum ggml_type
    switch (type) {
        case 10: return dot_q2_k;
        case 11: return dot_q3_k;
        case 12: return dot_q4_k;
        case 13: return dot_q5_k;
        case 14: return dot_q6_k;
        case 16: return dot_iq2_xxs;
        case 17: return dot_iq2_xs;
        case 19: return dot_iq1_s;
        case 22: return dot_iq2_s;
        case 29: return dot_iq1_m;
        default: return 0;
    }
}
#else  // ggml's products, made for this processor, are called by our threads
#define KERNELS "our threads and ggml's products"
static dot_function own_dot(int type) {
    (void)type;
    return 0;
}
#endif

const char *qk_kernels(void) { return KERNELS; }

int qk_has(int type) { return own_dot(type) != 0; }

// A table: 0 iq1, 1 iq2_xxs, 2 iq2_xs, 3 iq2_s.
void qk_table(int kind, const void *from) {
    switch (kind) {
        case 0: memcpy(grids.iq1, from, sizeof grids.iq1); break;
        case 1: memcpy(grids.iq2_xxs, from, sizeof grids.iq2_xxs); break;
        case 2: memcpy(grids.iq2_xs, from, sizeof grids.iq2_xs); break;
        case 3: memcpy(grids.iq2_s, from, sizeof grids.iq2_s); break;
    }
}

int64_t qk_act_bytes(int64_t n) { return (int64_t)act_bytes(n); }

void qk_quantize(const float *x, uint8_t *out, int64_t n) {
    for (int64_t b = 0; b < n / SUPERBLOCK; b++) quantize_superblock(x + SUPERBLOCK * b, out, n, b);
}

// n_rows of weights times m rows of activations (one after the other in `acts`): out [n_rows, m].
void qk_product(int type, const uint8_t *rows, int64_t row_bytes, int64_t n_rows, int64_t n, const uint8_t *acts, int m, float *out) {
    act_row y[MOST_ROWS];
    for (int i = 0; i < m; i++) y[i] = act_at(acts + act_bytes(n) * (size_t)i, n);
    const dot_function dot = own_dot(type);
    for (int64_t r = 0; r < n_rows; r++) dot(rows + row_bytes * r, n / SUPERBLOCK, y, m, out + r * m);
}

#include "step.h"
#include "pool.h"
