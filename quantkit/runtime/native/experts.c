// Routed experts of few tokens from their packed bytes. See library.py for how it is compiled, checked and called.
#define _GNU_SOURCE
#include "rows.h"

typedef void (*dot_function)(const uint8_t *, int64_t, int64_t, const act_row *, int, float *, const uint8_t *);

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "codebooks.h"
#include "kquants.h"
#define OWN 2
#if VNNI
#define KERNELS "AVX-512 VNNI"
#else
#define KERNELS "AVX-512"
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#include "codebooks.h"
#define OWN 1
#if VNNI
#define KERNELS "AVX2 VNNI (k-quants: ggml's products)"
#else
#define KERNELS "AVX2 (k-quants: ggml's products)"
#endif
#else  // ggml's products, made for this processor, are called by our threads
#define OWN 0
#define KERNELS "our threads and ggml's products"
#endif

static dot_function own_dot(int type) {  // enum ggml_type
    switch (type) {
#if OWN > 0
        case 16: return dot_iq2_xxs;
        case 17: return dot_iq2_xs;
        case 19: return dot_iq1_s;
        case 22: return dot_iq2_s;
        case 29: return dot_iq1_m;
#endif
#if OWN > 1
        case 10: return dot_q2_k;
        case 11: return dot_q3_k;
        case 12: return dot_q4_k;
        case 13: return dot_q5_k;
        case 14: return dot_q6_k;
#endif
        default: return 0;
    }
}

const char *qk_kernels(void) { return KERNELS; }

int qk_has(int type) { return own_dot(type) != 0; }

// A codebook, its entries as eight bytes: 0 iq1 (0, 1, 2), 1 iq2_xxs, 2 iq2_xs, 3 iq2_s.
void qk_codebook(int kind, const uint8_t *from) {
#if OWN > 0
    set_codebook(kind, from);
#else
    (void)kind, (void)from;
#endif
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
    dot(rows, n_rows, n / SUPERBLOCK, y, m, out, rows + row_bytes * n_rows);
}

#include "step.h"
#include "pool.h"
