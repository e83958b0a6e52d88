/* Intel AMX on a CPU without it, so that llama.cpp's AMX code can be run and judged anywhere.
 *
 *     gcc -O3 -march=native -shared -fPIC scripts/research/amx_emulator.c -o amx_emulator.so -ldl
 *     LD_PRELOAD=$PWD/amx_emulator.so llama-perplexity -m FILE.gguf ...
 *
 * Its own test: gcc -O2 -DSELF_TEST -mamx-tile -mamx-int8 -mamx-bf16 scripts/research/amx_emulator.c -o test && ./test
 *
 * A CPU without AMX raises SIGILL at each of its instructions; the handler here decodes it (all are VEX coded), computes
 * it on tiles that every thread has of its own, and goes on behind it. Linux's question for permission to use tiles
 * (arch_prctl, through libc's syscall) is answered with yes. Written from Intel's "Architecture Instruction Set
 * Extensions", chapter AMX: LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD(T1), TILESTORED, TDPB{SS,SU,US,UU}D
 * and TDPBF16PS, palette 1. What faults on the real CPU ends the program here too: #UD by SIGILL, #GP by SIGSEGV.
 * Slow (a trap is a microsecond or two), which tiny models can bear. At the end stderr says how many were computed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64 };                      /* palette 1 */
enum { ARCH_GET_XCOMP_SUPP = 0x1021, ARCH_GET_XCOMP_PERM = 0x1022, ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
enum { NO_PREFIX, PREFIX_66, PREFIX_F3, PREFIX_F2 };                      /* VEX.pp */
enum { DONE, NOT_OURS, UNDEFINED, PROTECTION };

typedef struct {                                                          /* as LDTILECFG reads it */
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Config;

typedef struct {
    Config config;
    uint8_t data[TILES][MOST_ROWS][MOST_BYTES];
} State;

typedef struct {                                                          /* one decoded instruction */
    int opcode, prefix, tile, rm, other, in_memory, length;
    uint8_t *address;                                                     /* of SIB.base + displacement, or modrm */
    int64_t stride;                                                       /* SIB.index << scale */
} Instruction;

static __thread State state __attribute__((tls_model("initial-exec")));
static atomic_long computed;

static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void locate(const uint8_t *at, const greg_t *regs, int vex, int mod, int rm, Instruction *out) {
    /* at: behind modrm. vex: byte 1 of the prefix, whose R, X, B are stored inverted. */
    int base = rm | (vex & 0x20 ? 0 : 8), length = 0;
    int64_t from = 0;
    if (rm == 4) {
        int sib = at[length++], index = ((sib >> 3) & 7) | (vex & 0x40 ? 0 : 8);
        base = (sib & 7) | (vex & 0x20 ? 0 : 8);
        out->stride = index == 4 ? 0 : regs[REGISTERS[index]] * (1LL << (sib >> 6));
    }
    int no_base = mod == 0 && (base & 7) == 5;                            /* disp32 alone, or rip + disp32 without a SIB */
    if (!no_base) from = regs[REGISTERS[base]];
    if (mod == 1) {
        from += (int8_t)at[length];
        length += 1;
    } else if (mod == 2 || no_base) {
        int32_t disp;
        memcpy(&disp, at + length, 4);
        from += disp;
        length += 4;
    }
    out->length += length;
    if (no_base && rm != 4) from += regs[REG_RIP] + out->length;
    out->address = (uint8_t *)from;
}

static int decode(const uint8_t *at, const greg_t *regs, Instruction *out) {
    if (at[0] != 0xC4 || (at[1] & 0x1F) != 2 || (at[2] & 0x84) != 0) return NOT_OURS; /* map 0F38, W = 0, L = 0 */
    int modrm = at[4], mod = modrm >> 6;
    *out = (Instruction){.opcode = at[3], .prefix = at[2] & 3, .tile = (modrm >> 3) & 7, .rm = modrm & 7,
                         .other = (~at[2] >> 3) & 15, .in_memory = mod != 3, .length = 5};
    int of_amx = out->opcode == 0x49 || out->opcode == 0x4B || out->opcode == 0x5E || out->opcode == 0x5C;
    if (!of_amx) return NOT_OURS;
    if (out->in_memory) locate(at + 5, regs, at[1], mod, out->rm, out);
    return DONE;
}

static int load_config(const uint8_t *from) {
    Config next;
    memcpy(&next, from, sizeof next);
    if (next.palette == 0) {
        memset(&state, 0, sizeof state);
        return DONE;
    }
    if (next.palette != 1) return PROTECTION;
    for (int i = 0; i < 14; i++)
        if (next.reserved[i]) return PROTECTION;
    for (int i = 0; i < 16; i++) {
        int unused = next.rows[i] == 0 && next.bytes[i] == 0;
        int fits = i < TILES && next.rows[i] && next.bytes[i] && next.rows[i] <= MOST_ROWS && next.bytes[i] <= MOST_BYTES;
        if (!unused && !fits) return PROTECTION;
    }
    memset(&state, 0, sizeof state);
    state.config = next;
    return DONE;
}

static int configured(int tile) { return tile < TILES && state.config.palette == 1 && state.config.rows[tile] != 0; }

static int move(const Instruction *i) {
    if (i->prefix == NO_PREFIX || !i->in_memory || i->rm != 4 || !configured(i->tile)) return UNDEFINED;
    if (state.config.start_row >= state.config.rows[i->tile]) return UNDEFINED;
    int n = state.config.bytes[i->tile];
    for (int row = state.config.start_row; row < state.config.rows[i->tile]; row++) {
        uint8_t *memory = i->address + row * i->stride, *tile = state.data[i->tile][row];
        if (i->prefix == PREFIX_F3) {
            memcpy(memory, tile, n);                                      /* TILESTORED */
        } else {
            memset(tile, 0, MOST_BYTES);                                  /* TILELOADD, TILELOADDT1 */
            memcpy(tile, memory, n);
        }
    }
    if (i->prefix != PREFIX_F3)
        for (int row = state.config.rows[i->tile]; row < MOST_ROWS; row++) memset(state.data[i->tile][row], 0, MOST_BYTES);
    state.config.start_row = 0;
    return DONE;
}

static float of_bf16(const uint8_t *bytes) {
    uint32_t bits = (uint32_t)(bytes[0] | bytes[1] << 8) << 16;
    if ((bits & 0x7F800000) == 0) bits &= 0x80000000;                     /* denormals are zero */
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void products(int32_t *sum, const uint8_t *a, const uint8_t *b, int n, int a_signed, int b_signed) {
    /* sum, int32 [n], += the products of four bytes of a with each four of b. */
    int32_t left[4];
    for (int i = 0; i < 4; i++) left[i] = a_signed ? (int8_t)a[i] : a[i];
    if (b_signed) {
        const int8_t *right = (const int8_t *)b;
        for (int c = 0; c < n; c++)
            for (int i = 0; i < 4; i++) sum[c] += left[i] * right[4 * c + i];
    } else {
        for (int c = 0; c < n; c++)
            for (int i = 0; i < 4; i++) sum[c] += left[i] * b[4 * c + i];
    }
}

static int multiply(const Instruction *i) {
    int c = i->tile, a = i->rm, b = i->other;                             /* C += A B */
    if (i->in_memory || a == b || a == c || b == c || !configured(a) || !configured(b) || !configured(c)) return UNDEFINED;
    const Config *g = &state.config;
    int inner = g->bytes[a] / 4, rows = g->rows[c], columns = g->bytes[c] / 4;
    if (g->bytes[a] % 4 || g->bytes[b] % 4 || g->bytes[c] % 4) return UNDEFINED;
    if (g->rows[a] != rows || g->bytes[b] != g->bytes[c] || g->rows[b] != inner) return UNDEFINED;
    for (int m = 0; m < rows; m++) {
        for (int k = 0; k < inner; k++) {
            const uint8_t *left = state.data[a][m] + 4 * k, *right = state.data[b][k];
            if (i->opcode == 0x5E) {
                int a_signed = i->prefix == PREFIX_F2 || i->prefix == PREFIX_F3;
                int b_signed = i->prefix == PREFIX_F2 || i->prefix == PREFIX_66;
                products((int32_t *)state.data[c][m], left, right, columns, a_signed, b_signed);
            } else {
                float *sum = (float *)state.data[c][m];
                for (int n = 0; n < columns; n++) {
                    sum[n] += of_bf16(left) * of_bf16(right + 4 * n);
                    sum[n] += of_bf16(left + 2) * of_bf16(right + 4 * n + 2);
                }
            }
        }
        memset(state.data[c][m] + g->bytes[c], 0, MOST_BYTES - g->bytes[c]);
    }
    for (int m = rows; m < MOST_ROWS; m++) memset(state.data[c][m], 0, MOST_BYTES);
    state.config.start_row = 0;
    return DONE;
}

static int configure(const Instruction *i) {
    if (i->in_memory && i->tile == 0 && i->prefix == NO_PREFIX) return load_config(i->address);   /* LDTILECFG */
    if (i->in_memory && i->tile == 0 && i->prefix == PREFIX_66) {                                 /* STTILECFG */
        memcpy(i->address, &state.config, sizeof state.config);
        return DONE;
    }
    if (!i->in_memory && i->tile == 0 && i->rm == 0 && i->prefix == NO_PREFIX) {                  /* TILERELEASE */
        memset(&state, 0, sizeof state);
        return DONE;
    }
    if (!i->in_memory && i->rm == 0 && i->prefix == PREFIX_F2 && configured(i->tile)) {           /* TILEZERO */
        memset(state.data[i->tile], 0, sizeof state.data[i->tile]);
        return DONE;
    }
    return UNDEFINED;
}

static int compute(const Instruction *i) {
    if (i->opcode == 0x49) return configure(i);
    if (i->opcode == 0x4B) return move(i);
    if (i->opcode == 0x5C && i->prefix != PREFIX_F3) return UNDEFINED;                            /* FP16 tiles */
    return multiply(i);
}

static void trapped(int signal_number, siginfo_t *info, void *context) {
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    Instruction found;
    int outcome = decode((const uint8_t *)regs[REG_RIP], regs, &found);
    if (outcome == DONE) outcome = compute(&found);
    if (outcome == DONE) {
        regs[REG_RIP] += found.length;
        atomic_fetch_add_explicit(&computed, 1, memory_order_relaxed);
        return;
    }
    signal(signal_number, SIG_DFL);                                       /* met again on return, and fatal */
    if (info->si_code <= 0) raise(signal_number);                         /* sent by a process: not met again */
    if (outcome == PROTECTION) {
        signal(SIGSEGV, SIG_DFL);
        raise(SIGSEGV);
    }
}

long syscall(long number, ...) {
    static long (*libc)(long, ...);
    long given[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) given[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_arch_prctl && given[0] == ARCH_REQ_XCOMP_PERM && given[1] == XTILEDATA) return 0;
    if (number == SYS_arch_prctl && (given[0] == ARCH_GET_XCOMP_PERM || given[0] == ARCH_GET_XCOMP_SUPP)) {
        *(uint64_t *)given[1] = 3ULL << 17;                               /* tile configuration and tile data */
        return 0;
    }
    if (!libc) libc = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return libc(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, NULL);
}

__attribute__((destructor)) static void end(void) {
    if (computed) fprintf(stderr, "amx_emulator: %ld AMX instructions computed\n", computed);
}

#ifdef SELF_TEST
#include <immintrin.h>

static unsigned chance = 1;

static int next(void) { return (chance = chance * 1103515245u + 12345u) >> 16; }

enum { M = 13, K = 36, N = 11 };                                          /* rows and columns that fill no tile; K bytes */

static uint8_t A[M][K + 9], B[K / 4][N * 4 + 20];                         /* strides of their own */
static int32_t C[M][N + 3], WANT[M][N];

static void ask(int a_signed, int b_signed) {
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            WANT[m][n] = C[m][n] = next();
            for (int k = 0; k < K; k++) {
                int left = A[m][k], right = B[k / 4][4 * n + k % 4];
                WANT[m][n] += (a_signed ? (int8_t)left : left) * (b_signed ? (int8_t)right : right);
            }
        }
    _tile_loadd(0, C, sizeof C[0]);
}

static int judge(const char *name) {
    _tile_stored(0, C, sizeof C[0]);
    int wrong = 0;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) wrong += C[m][n] != WANT[m][n];
    printf("%-10s %s\n", name, wrong ? "WRONG" : "equal");
    return wrong;
}

static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits >> 16;
}

static int bfloat(void) {                                                 /* small integers: every sum is exact */
    float sums[M][N] = {{0}}, got[M][N];
    uint16_t a[M][K / 2], b[K / 4][N * 2];
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K / 2; k++) {
            float value = next() % 64 - 32;
            a[m][k] = to_bf16(value);
        }
    for (int k = 0; k < K / 4; k++)
        for (int n = 0; n < N * 2; n++) {
            float value = next() % 64 - 32;
            b[k][n] = to_bf16(value);
        }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            for (int k = 0; k < K / 2; k++)
                sums[m][n] += of_bf16((uint8_t *)&a[m][k]) * of_bf16((uint8_t *)&b[k / 2][2 * n + k % 2]);
    _tile_zero(0);
    _tile_loadd(1, a, sizeof a[0]);
    _tile_loadd(2, b, sizeof b[0]);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, got, sizeof got[0]);
    int wrong = memcmp(got, sums, sizeof got) != 0;
    printf("%-10s %s\n", "TDPBF16PS", wrong ? "WRONG" : "equal");
    return wrong;
}

int main(void) {
    Config config = {.palette = 1, .rows = {M, M, K / 4}, .bytes = {N * 4, K, N * 4}}, kept;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA)) return 1;
    _tile_loadconfig(&config);
    _tile_storeconfig(&kept);
    int wrong = memcmp(&config, &kept, sizeof kept) != 0;
    for (size_t i = 0; i < sizeof A; i++) ((uint8_t *)A)[i] = next();
    for (size_t i = 0; i < sizeof B; i++) ((uint8_t *)B)[i] = next();
    _tile_loadd(1, A, sizeof A[0]);
    _tile_stream_loadd(2, B, sizeof B[0]);
    ask(1, 1); _tile_dpbssd(0, 1, 2); wrong += judge("TDPBSSD");
    ask(1, 0); _tile_dpbsud(0, 1, 2); wrong += judge("TDPBSUD");
    ask(0, 1); _tile_dpbusd(0, 1, 2); wrong += judge("TDPBUSD");
    ask(0, 0); _tile_dpbuud(0, 1, 2); wrong += judge("TDPBUUD");
    wrong += bfloat();
    _tile_release();
    return wrong != 0;
}
#endif
