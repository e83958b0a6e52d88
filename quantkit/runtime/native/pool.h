// Threads that wait for work: they spin for a short while, then sleep on a futex.
//
// Whoever calls works along. A worker is counted in `active` before it looks whether work is `open`, and work is closed
// before the caller waits for `active` to be 0: so none touches work that is over, however late it woke up.
// After a fork the child has no threads: it must make a pool of its own. At exit sleeping threads just end.
#pragma once
#include "step.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    _Alignas(64) int32_t epoch;  // changes when there is something to look at
    _Alignas(64) int32_t open;
    _Alignas(64) int32_t active;
    int32_t sleeping, useful, n;  // useful: threads that this work is shared by
    int64_t spin_ns, busy_ns;     // busy: in calls altogether
    pthread_mutex_t lock;  // one call at a time
    work w;
} pool;

typedef struct {
    pool *p;
    int32_t i;
} seat;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void wait_for_change(pool *p, int32_t seen) {
    const int64_t until = now_ns() + p->spin_ns;
    for (int looks = 1; __atomic_load_n(&p->epoch, __ATOMIC_ACQUIRE) == seen; looks++) {
        relax();
        if (looks % 64 == 0 && now_ns() > until) break;
    }
    if (__atomic_load_n(&p->epoch, __ATOMIC_ACQUIRE) != seen) return;
    __atomic_fetch_add(&p->sleeping, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&p->epoch, __ATOMIC_SEQ_CST) == seen)
        syscall(SYS_futex, &p->epoch, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
    __atomic_fetch_sub(&p->sleeping, 1, __ATOMIC_SEQ_CST);
}

static void *worker(void *argument) {
    const seat own = *(seat *)argument;
    pool *p = own.p;
    free(argument);
    for (int32_t seen = 0;;) {
        wait_for_change(p, seen);
        seen = __atomic_load_n(&p->epoch, __ATOMIC_SEQ_CST);
        __atomic_fetch_add(&p->active, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&p->open, __ATOMIC_SEQ_CST) && own.i < p->useful) share(&p->w);
        __atomic_fetch_sub(&p->active, 1, __ATOMIC_SEQ_CST);
    }
    return 0;
}

// Let the threads spin: there will be work soon.
void qk_wake(pool *p) {
    __atomic_fetch_add(&p->epoch, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&p->sleeping, __ATOMIC_SEQ_CST)) syscall(SYS_futex, &p->epoch, FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0);
}

// n threads, the caller among them; its others on these cores (none: wherever the system puts them).
// Null if they cannot be had.
pool *qk_pool(int n, int64_t spin_ns, const int32_t *cores, int n_cores) {
    pool *p = aligned_alloc(64, (sizeof(pool) + 63) / 64 * 64);
    if (!p) return 0;
    memset(p, 0, sizeof *p);
    p->n = n;
    p->spin_ns = spin_ns;
    pthread_mutex_init(&p->lock, 0);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int i = 0; i < n_cores; i++) CPU_SET(cores[i], &set);
    for (int i = 1; i < n; i++) {
        pthread_t thread;
        seat *own = malloc(sizeof(seat));
        if (own) *own = (seat){p, i};
        if (!own || pthread_create(&thread, &attributes, worker, own)) {
            free(own);
            return 0;  // the threads there are sleep on; the caller gives up natively
        }
        if (n_cores) pthread_setaffinity_np(thread, sizeof set, &set);
    }
    pthread_attr_destroy(&attributes);
    return p;
}

#define WORTH_A_THREAD (1 << 18)  // weights: some 10 us

// x float [n, d], ids [n, n_used], weight [n, n_used] -> out [n, d], added to it if `adds`; 0, or -1 without memory.
int qk_experts(pool *p, const layer *l, int64_t n, const float *x, const int32_t *ids, const float *weight, float *out, int adds) {
    const int64_t d = l->gate.n_in;
    pthread_mutex_lock(&p->lock);
    const int64_t begun = now_ns();
    work *w = &p->w;
    w->l = l;
    w->n = n;
    w->x = x, w->x_step = d;
    w->ids = ids, w->id_step = l->n_used;
    w->weight = weight, w->weight_step = l->n_used;
    w->out = out, w->out_step = d;
    w->adds = adds;
    const int there = prepare(w);
    if (there) {
        const int64_t weights = 3 * d * l->down.n_in * w->n_groups;
        const int64_t useful = weights / WORTH_A_THREAD;
        p->useful = useful < p->n ? (int32_t)useful : p->n;
        if (p->useful > 1) {
            __atomic_store_n(&p->open, 1, __ATOMIC_SEQ_CST);
            qk_wake(p);
        }
        share(w);
        __atomic_store_n(&p->open, 0, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&p->active, __ATOMIC_SEQ_CST)) relax();
    }
    p->busy_ns += now_ns() - begun;
    pthread_mutex_unlock(&p->lock);
    return there ? 0 : -1;
}

int64_t qk_busy_ns(pool *p) {
    pthread_mutex_lock(&p->lock);
    const int64_t busy = p->busy_ns;
    pthread_mutex_unlock(&p->lock);
    return busy;
}

// What a GPU hands over in a step, and where it looks for the answer: memory of the host that both see. Of m rows those
// beyond n repeat the last.
typedef struct {
    int64_t n, m;
    const float *x;
    const int32_t *ids;
    const float *weight;
    float *out;
    int32_t *kept;            // ids [n, n_used] are copied here first: the GPU may write the next ones once it has its answer
    const int32_t *arrived;   // of each of m rows the number of the step, when it is there
    int32_t *answered;
    int64_t patience_ns;
} exchange;

#define POLITE 64  // looks, some microseconds, between two chances for others: whoever sends tokens has work meanwhile

// Wait for the rows of this step and answer them: 0; 1 if they have not come for patience_ns, -1 as qk_experts.
int qk_exchange(pool *p, const layer *l, const exchange *e, int32_t step) {
    qk_wake(p);
    const int64_t until = now_ns() + e->patience_ns;
    for (int64_t i = 0, looks = 1; i < e->m; looks++) {
        if (__atomic_load_n(e->arrived + i, __ATOMIC_ACQUIRE) == step) {
            i++;
            continue;
        }
        if (looks % POLITE) {
            relax();
            continue;
        }
        sched_yield();
        if (looks % PATIENCE == 0 && now_ns() > until) return 1;
    }
    memcpy(e->kept, e->ids, sizeof(int32_t) * (size_t)(e->n * l->n_used));
    const int failed = qk_experts(p, l, e->n, e->x, e->ids, e->weight, e->out, 0);
    if (failed) return failed;
    const int64_t d = l->down.n_out;
    for (int64_t i = e->n; i < e->m; i++) memcpy(e->out + d * i, e->out + d * (e->n - 1), sizeof(float) * (size_t)d);
    __atomic_store_n(e->answered, step, __ATOMIC_RELEASE);
    return 0;
}

// The same by ggml's threads, as a node of a graph (ggml_custom3_op_t): dst and x [d, n], ids [n_used, n], weight
// [1, n_used, n].

typedef struct {  // ggml_tensor of ggml 0.20, as in ggml/library.py
    int32_t type;
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
    int32_t op, op_params[16], flags;
    void *src[10], *view_src;
    size_t view_offs;
    void *data;
    char name[64];
    void *extra;
    char padding[8];
} tensor;

typedef struct {
    const layer *l;
    int32_t *failed;  // set to 1 if there is no memory: checked after the graph
    _Alignas(64) int32_t ready, left, there;
    work w;
} node;

node *qk_node(const layer *l, int32_t *failed) {
    node *own = aligned_alloc(64, (sizeof(node) + 63) / 64 * 64);
    if (!own) return 0;
    memset(own, 0, sizeof *own);
    own->l = l;
    own->failed = failed;
    return own;
}

void qk_drop_node(node *own) {
    free(own->w.memory);
    free(own);
}

void qk_compute_node(tensor *dst, const tensor *x, const tensor *ids, const tensor *weight, int ith, int nth, void *data) {
    node *own = data;
    if (ith == 0) {
        work *w = &own->w;
        w->l = own->l;
        w->n = x->ne[1];
        w->x = x->data, w->x_step = (int64_t)x->nb[1] / 4;
        w->ids = ids->data, w->id_step = (int64_t)ids->nb[1] / 4;
        w->weight = weight->data, w->weight_step = (int64_t)weight->nb[2] / 4;
        w->out = dst->data, w->out_step = (int64_t)dst->nb[1] / 4;
        own->there = prepare(w);
        if (!own->there) *own->failed = 1;
        __atomic_store_n(&own->ready, 1, __ATOMIC_RELEASE);
    }
    WAIT_WHILE(!__atomic_load_n(&own->ready, __ATOMIC_ACQUIRE));
    if (own->there) share(&own->w);
    if (__atomic_add_fetch(&own->left, 1, __ATOMIC_ACQ_REL) == nth) {  // ggml's barrier comes before the next call
        own->left = 0;
        __atomic_store_n(&own->ready, 0, __ATOMIC_RELEASE);
    }
}
