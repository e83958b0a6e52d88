// One call: the routed experts of a layer for n tokens, by any number of threads that enter `share`.
//
// Three phases, each cut into pieces that threads take from a counter: activations are quantized; rows of gate and up of
// each expert that any token chose, whose results are quantized as soon as 256 of them are there; rows of down, each for
// all experts, so that no two threads add to the same output. The second begins when all pieces of the first are done,
// however many threads have come by then; in the third a thread waits for an expert only if its inputs are not there yet. A
// token's numbers depend on nothing but the token.
#pragma once
#include "rows.h"
#include <sched.h>
#include <stdlib.h>

typedef void (*ggml_from_float)(const float *, void *, int64_t);
typedef void (*ggml_vec_dot)(int, float *, size_t, const void *, size_t, const void *, size_t, int);

// A stack of matrices [n_expert, n_out, row_bytes]. Without an own product for the type: ggml's, with its own form of
// activations, `act_block` bytes for 256 of them.
typedef struct {
    const uint8_t *data;
    int64_t n_in, n_out, row_bytes;
    int32_t type, foreign;
    ggml_from_float from_float;
    ggml_vec_dot vec_dot;
    int64_t act_block;
} matrix;

typedef struct {
    matrix gate, up, down;
    int64_t n_expert, n_used;
    float limit;  // gate is at most this, up between it and its negative; INFINITY: neither
} layer;

enum { QUANTIZE, HIDDEN, OUTPUT, PHASES };
#define HIDDEN_ROWS 16
#define OUTPUT_ROWS 32
#define INPUT_BLOCKS 4  // superblocks of a token's activations that are a piece

typedef struct {
    _Alignas(64) int64_t next;
    _Alignas(64) int64_t done;  // pieces of the first phase
    _Alignas(64) int64_t pieces;
} phase;

typedef struct {
    const layer *l;
    const float *x, *weight;  // of token t: x + t x_step, weight + t weight_step
    const int32_t *ids;
    float *out;
    int32_t adds;  // to what stands in `out`: the sum goes on from other experts
    int64_t n, x_step, weight_step, id_step, out_step;
    int64_t n_groups;  // experts that are used
    int32_t *expert, *begin, *pair;  // of each group: expert, its first pair
    int32_t *missing, *ready;        // of each group: rows that a superblock of hidden lacks, superblocks that are quantized
    float *hidden;                   // [pairs, n_ff]
    uint8_t *acts, *acts_up, *acts_hidden;
    phase phases[PHASES];
    uint8_t *memory;
    size_t n_memory;
} work;

static inline int64_t take(phase *f) { return __atomic_fetch_add(&f->next, 1, __ATOMIC_RELAXED); }

static inline void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

#define PATIENCE 4096  // looks at a counter before another process may have the core

#define WAIT_WHILE(condition)               \
    for (int looks = 0; condition; looks++) \
        if (looks < PATIENCE) relax();      \
        else sched_yield()

static int64_t act_size(const matrix *m) {
    return m->foreign ? (m->act_block * (m->n_in / SUPERBLOCK) + 63) / 64 * 64 : (int64_t)act_bytes(m->n_in);
}

static int same_acts(const matrix *a, const matrix *b) {
    return a->foreign == b->foreign && (!a->foreign || a->from_float == b->from_float);
}

static int64_t input_pieces(const layer *l) { return (l->gate.n_in / SUPERBLOCK + INPUT_BLOCKS - 1) / INPUT_BLOCKS; }

static void quantize(const matrix *m, const float *x, uint8_t *acts, int64_t block) {
    if (m->foreign) m->from_float(x, acts + m->act_block * block, SUPERBLOCK);
    else quantize_superblock(x, acts, m->n_in, block);
}

// Memory for n tokens, and which expert has which of them; ids below 0 are of experts that are computed elsewhere. 0 if
// there is not enough, or an expert that is none.
static int prepare(work *w) {
    const layer *l = w->l;
    const int64_t n_pairs = w->n * l->n_used, n_ff = l->down.n_in, blocks = n_ff / SUPERBLOCK;
    const int64_t most = n_pairs < l->n_expert ? n_pairs : l->n_expert;
    const int64_t in = act_size(&l->gate), in_up = same_acts(&l->gate, &l->up) ? 0 : act_size(&l->up);
    const int64_t sizes[] = {4 * most, 4 * (l->n_expert + 1), 4 * n_pairs, 4 * most * blocks, 4 * most, 4 * n_pairs * n_ff, in * w->n, in_up * w->n, act_size(&l->down) * n_pairs};
    void **places[] = {(void **)&w->expert, (void **)&w->begin, (void **)&w->pair, (void **)&w->missing, (void **)&w->ready, (void **)&w->hidden, (void **)&w->acts, (void **)&w->acts_up, (void **)&w->acts_hidden};
    size_t size = 0;
    for (int i = 0; i < 9; i++) size += (size_t)(sizes[i] + 63) / 64 * 64;
    if (size > w->n_memory) {
        free(w->memory);
        w->memory = aligned_alloc(64, size);
        w->n_memory = w->memory ? size : 0;
        if (!w->memory) return 0;
    }
    uint8_t *at = w->memory;
    for (int i = 0; i < 9; i++) {
        *places[i] = at;
        at += (sizes[i] + 63) / 64 * 64;
    }
    if (!in_up) w->acts_up = w->acts;
    int32_t *count = w->begin;  // counting sort of pairs by expert, in the order of tokens
    memset(count, 0, sizeof(int32_t) * (size_t)(l->n_expert + 1));
    for (int64_t p = 0; p < n_pairs; p++) {
        const int32_t e = w->ids[p / l->n_used * w->id_step + p % l->n_used];
        if (e >= l->n_expert) return 0;
        if (e >= 0) count[e + 1]++;
    }
    for (int64_t e = 0; e < l->n_expert; e++) count[e + 1] += count[e];
    const int32_t n_here = count[l->n_expert];
    for (int64_t p = 0; p < n_pairs; p++) {
        const int32_t e = w->ids[p / l->n_used * w->id_step + p % l->n_used];
        if (e >= 0) w->pair[count[e]++] = (int32_t)p;
    }
    w->n_groups = 0;  // count[e] is where e ends now
    for (int32_t e = 0, begin = 0; e < l->n_expert; e++) {
        const int32_t end = count[e];
        if (end == begin) continue;
        w->expert[w->n_groups] = e;
        w->begin[w->n_groups++] = begin;  // n_groups <= e: not needed any more
        begin = end;
    }
    w->begin[w->n_groups] = n_here;
    for (int64_t i = 0; i < w->n_groups * blocks; i++) w->missing[i] = SUPERBLOCK;
    memset(w->ready, 0, sizeof(int32_t) * (size_t)w->n_groups);
    w->phases[QUANTIZE].pieces = w->n * (in_up ? 2 : 1) * input_pieces(l);
    w->phases[HIDDEN].pieces = w->n_groups * (n_ff / HIDDEN_ROWS);
    w->phases[OUTPUT].pieces = l->down.n_out / OUTPUT_ROWS;
    for (int i = 0; i < PHASES; i++) w->phases[i].next = w->phases[i].done = 0;
    return 1;
}

// n_rows rows of a matrix with n <= MOST_ROWS rows of activations: out [n_rows, n]. then: what is read afterwards.
static inline void product(
    const matrix *m, dot_function own, const uint8_t *rows, int n_rows, const act_row *y, const uint8_t **acts, int n, float *out, const uint8_t *then) {
    if (own) own(rows, n_rows, m->n_in / SUPERBLOCK, y, n, out, then);
    else
        for (int r = 0; r < n_rows; r++)
            for (int i = 0; i < n; i++) m->vec_dot((int)m->n_in, out + n * r + i, 0, rows + m->row_bytes * r, 0, acts[i], 0, 1);
}

static void quantize_input(work *w, int64_t piece) {
    const int64_t a_token = input_pieces(w->l), first = piece % a_token * INPUT_BLOCKS, t = piece / a_token % w->n;
    const int for_up = piece >= a_token * w->n;
    const matrix *m = for_up ? &w->l->up : &w->l->gate;
    uint8_t *acts = (for_up ? w->acts_up : w->acts) + act_size(m) * t;
    for (int64_t b = first; b < first + INPUT_BLOCKS && b < m->n_in / SUPERBLOCK; b++) quantize(m, w->x + t * w->x_step + SUPERBLOCK * b, acts, b);
}

static const uint8_t *gate_rows(const work *w, int64_t piece) {
    const matrix *gate = &w->l->gate;
    const int64_t a_group = gate->n_out / HIDDEN_ROWS;
    return gate->data + gate->row_bytes * (gate->n_out * w->expert[piece / a_group] + piece % a_group * HIDDEN_ROWS);
}

// Beginnings of rows that are read much later than what is read now.
static inline __attribute__((always_inline)) void soon(const uint8_t *rows) {
    for (int c = 0; c < 1024; c += 64) __builtin_prefetch(rows + c, 0, 2);
}

static void hidden_rows(work *w, int64_t piece, int64_t next) {
    const layer *l = w->l;
    const int64_t n_ff = l->down.n_in, a_group = n_ff / HIDDEN_ROWS, g = piece / a_group, r0 = piece % a_group * HIDDEN_ROWS;
    const uint8_t *gate = gate_rows(w, piece), *next_gate = next < w->phases[HIDDEN].pieces ? gate_rows(w, next) : gate;
    const uint8_t *up = l->up.data + l->up.row_bytes * (n_ff * w->expert[g] + r0);
    soon(up);
    soon(next_gate);
    const dot_function gate_dot = l->gate.foreign ? 0 : own_dot(l->gate.type), up_dot = l->up.foreign ? 0 : own_dot(l->up.type);
    for (int32_t begin = w->begin[g], end; begin < w->begin[g + 1]; begin = end) {
        end = begin + MOST_ROWS < w->begin[g + 1] ? begin + MOST_ROWS : w->begin[g + 1];
        const int m = end - begin;
        act_row y[MOST_ROWS], y_up[MOST_ROWS];
        const uint8_t *acts[MOST_ROWS], *acts_up[MOST_ROWS];
        for (int i = 0; i < m; i++) {
            const int64_t t = w->pair[begin + i] / l->n_used;
            acts[i] = w->acts + act_size(&l->gate) * t;
            acts_up[i] = w->acts_up + act_size(&l->up) * t;
            y[i] = act_at(acts[i], l->gate.n_in);
            y_up[i] = act_at(acts_up[i], l->up.n_in);
        }
        float a[HIDDEN_ROWS * MOST_ROWS], b[HIDDEN_ROWS * MOST_ROWS];
        const int last = end == w->begin[g + 1];
        product(&l->gate, gate_dot, gate, HIDDEN_ROWS, y, acts, m, a, up);
        product(&l->up, up_dot, up, HIDDEN_ROWS, y_up, acts_up, m, b, last ? next_gate : gate);
        for (int i = 0; i < m; i++) {
            float *hidden = w->hidden + n_ff * (begin + i) + r0;
            for (int r = 0; r < HIDDEN_ROWS; r++) {
                const float to = l->limit, x = a[m * r + i] > to ? to : a[m * r + i], u = b[m * r + i];
                hidden[r] = x / (1 + expf(-x)) * (u > to ? to : u < -to ? -to : u);
            }
        }
    }
    const int64_t block = r0 / SUPERBLOCK;
    int32_t *missing = w->missing + n_ff / SUPERBLOCK * g + block;
    if (__atomic_sub_fetch(missing, HIDDEN_ROWS, __ATOMIC_ACQ_REL)) return;
    for (int32_t p = w->begin[g]; p < w->begin[g + 1]; p++)
        quantize(&l->down, w->hidden + n_ff * p + SUPERBLOCK * block, w->acts_hidden + act_size(&l->down) * p, block);
    __atomic_add_fetch(w->ready + g, 1, __ATOMIC_RELEASE);
}

static const uint8_t *down_rows(const work *w, int64_t g, int64_t piece) {
    const matrix *down = &w->l->down;
    return down->data + down->row_bytes * (down->n_out * w->expert[g] + piece * OUTPUT_ROWS);
}

static void output_rows(work *w, int64_t piece, int64_t next) {
    const layer *l = w->l;
    const matrix *down = &l->down;
    const int64_t r0 = piece * OUTPUT_ROWS;
    const dot_function dot = down->foreign ? 0 : own_dot(down->type);
    const int32_t whole = (int32_t)(down->n_in / SUPERBLOCK);
    const int there_next = next < w->phases[OUTPUT].pieces;
    for (int64_t t = 0; t < w->n && !w->adds; t++) memset(w->out + t * w->out_step + r0, 0, sizeof(float) * OUTPUT_ROWS);
    for (int64_t g = 0; g < w->n_groups; g++) {
        const uint8_t *rows = down_rows(w, g, piece);
        const uint8_t *after = g + 1 < w->n_groups ? down_rows(w, g + 1, piece) : there_next ? down_rows(w, 0, next) : rows;
        if (there_next) soon(down_rows(w, g, next));
        WAIT_WHILE(__atomic_load_n(w->ready + g, __ATOMIC_ACQUIRE) < whole);
        for (int32_t begin = w->begin[g], end; begin < w->begin[g + 1]; begin = end) {
            end = begin + MOST_ROWS < w->begin[g + 1] ? begin + MOST_ROWS : w->begin[g + 1];
            const int m = end - begin;
            act_row y[MOST_ROWS];
            const uint8_t *acts[MOST_ROWS];
            float share[MOST_ROWS], *out[MOST_ROWS], v[OUTPUT_ROWS * MOST_ROWS];
            for (int i = 0; i < m; i++) {
                const int64_t p = w->pair[begin + i], t = p / l->n_used;
                acts[i] = w->acts_hidden + act_size(down) * (begin + i);
                y[i] = act_at(acts[i], down->n_in);
                share[i] = w->weight[t * w->weight_step + p % l->n_used];
                out[i] = w->out + t * w->out_step + r0;
            }
            product(down, dot, rows, OUTPUT_ROWS, y, acts, m, v, end == w->begin[g + 1] ? after : rows);
            for (int i = 0; i < m; i++)
                for (int r = 0; r < OUTPUT_ROWS; r++) out[i][r] += share[i] * v[m * r + i];
        }
    }
}

// Take part until nothing is left to take. Pieces with weights are taken one ahead, so that what they begin with can be asked
// for; activations are not: everybody waits for them, and a token has fewer pieces than there may be threads.
static void share(work *w) {
    static void (*const parts[PHASES])(work *, int64_t, int64_t) = {0, hidden_rows, output_rows};
    phase *f = w->phases + QUANTIZE;
    int64_t mine = 0;
    for (int64_t piece; (piece = take(f)) < f->pieces; mine++) quantize_input(w, piece);
    if (mine) __atomic_fetch_add(&f->done, mine, __ATOMIC_RELEASE);
    WAIT_WHILE(__atomic_load_n(&f->done, __ATOMIC_ACQUIRE) < f->pieces);
    for (int i = HIDDEN; i < PHASES; i++) {
        f = w->phases + i;
        for (int64_t piece = take(f), next; piece < f->pieces; piece = next) {
            next = take(f);
            parts[i](w, piece, next);
        }
    }
}
