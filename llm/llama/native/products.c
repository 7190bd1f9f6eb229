#include "products.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

/* ---- in float32: weights are unpacked in registers ---- */

#define STRIPS (LANES / WIDTH) /* of a panel: each fills a register */

/* Words of the panels, which have `stride` each, from output `strip` * WIDTH on. */
INLINE int64_t strip_at(int strip, int64_t stride) { return strip / STRIPS * stride + strip % STRIPS * WIDTH; }

#define LEAST(A, B) ((A) < (B) ? (A) : (B))

/* `PANELS` panels times `ROWS` rows: sums[panel][row], 16 outputs each. `TAKEN` strips are
   computed at a time. */
#define TILE(PANELS, ROWS)                                                                                             \
    INLINE void tile_##PANELS##x##ROWS(const Linear *w, int kind, int64_t panel, const float *x, const float *x_sums,  \
                                       float sums[PANELS][ROWS][LANES]) {                                              \
        enum { TAKEN = STRIPS == 1 ? PANELS : LEAST(PANELS * STRIPS, (ROWS < MOST_SUMS ? MOST_SUMS / ROWS : 1)) };     \
        const int64_t inputs = w->inputs, groups = inputs / GROUP, in_word = per_word(kind);                           \
        const int64_t stride = inputs / in_word * LANES;                                                               \
        for (int first = 0; first < PANELS * STRIPS; first += TAKEN) {                                                 \
            const uint32_t *words = w->weights + panel * stride;                                                       \
            f32 total[TAKEN][ROWS] = {};                                                                               \
            if (kind == F32 || kind == BF16) {                                                                         \
                for (int64_t k = 0; k < inputs; k += in_word, words += LANES)                                          \
                    UNROLL for (int s = 0; s < TAKEN; s++) {                                                           \
                        const u32 word = load_words(words + strip_at(first + s, stride));                              \
                        UNROLL for (int i = 0; i < in_word; i++) {                                                     \
                            const f32 weight = input_of(kind, word, i);                                                \
                            UNROLL for (int r = 0; r < ROWS; r++) total[s][r] += weight * x[r * inputs + k + i];       \
                        }                                                                                              \
                    }                                                                                                  \
            } else {                                                                                                   \
                const int per_group = kind == INT8 ? 1 : 2; /* vectors of scales */                                    \
                for (int64_t g = 0; g < groups; g++) {                                                                 \
                    f32 part[TAKEN][ROWS] = {};                                                                        \
                    for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += in_word, words += LANES)                     \
                        UNROLL for (int i = 0; i < in_word; i++)                                                       \
                            UNROLL for (int s = 0; s < TAKEN; s++) {                                                   \
                                const f32 q = input_of(kind, load_words(words + strip_at(first + s, stride)), i);      \
                                UNROLL for (int r = 0; r < ROWS; r++) part[s][r] += q * x[r * inputs + k + i];         \
                            }                                                                                          \
                    UNROLL for (int s = 0; s < TAKEN; s++) {                                                           \
                        const uint16_t *scales = w->scales + (panel * groups + g) * per_group * LANES +                \
                                                 strip_at(first + s, groups * per_group * LANES);                      \
                        const f32 scale = load_f16(scales);                                                            \
                        UNROLL for (int r = 0; r < ROWS; r++) total[s][r] += scale * part[s][r];                       \
                        if (kind == INT4) {                                                                            \
                            const f32 minimum = load_f16(scales + LANES);                                              \
                            UNROLL for (int r = 0; r < ROWS; r++) total[s][r] += minimum * x_sums[r * groups + g];     \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            UNROLL for (int s = 0; s < TAKEN; s++)                                                                     \
                UNROLL for (int r = 0; r < ROWS; r++)                                                                  \
                    store(&sums[(first + s) / STRIPS][r][(first + s) % STRIPS * WIDTH], total[s][r]);                  \
        }                                                                                                              \
    }

TILE(8, 1)
TILE(2, 1)
TILE(4, 2)
TILE(2, 2)
TILE(4, 4)
TILE(2, 4)
TILE(2, 8)

INLINE void put(const Linear *w, enum then then, int64_t panel, const float *sums, float *y) {
    const int64_t first = panel * LANES;
    if (first + LANES > w->outputs) { /* the last panels are filled up with zeros */
        for (int64_t i = first; i < w->outputs; i++) y[i] = sums[i - first] + (w->bias ? w->bias[i] : 0);
        return;
    }
    UNROLL for (int i = 0; i < LANES; i += WIDTH) {
        f32 sum = load(sums + i);
        if (w->bias) sum += load(w->bias + first + i);
        store(y + first + i, then == ADD ? load(y + first + i) + sum : sum);
    }
}

/* Finish the first `rows` of `panels` x `stride` sums of 16 outputs, which begin at `panel`; y begins at their first
   row. `kind` is how GATE stores. */
INLINE void finish(const Linear *w, enum then then, int kind, int64_t panel, int panels, int64_t rows, int64_t stride,
                   const float *sums, void *y, int64_t y_stride) {
    for (int64_t r = 0; r < rows; r++) {
        for (int p = 0; p < panels; p += then == GATE ? 2 : 1) {
            const float *of_panel = sums + (p * stride + r) * LANES;
            if (then != GATE) {
                put(w, then, panel + p, of_panel, (float *)y + r * y_stride);
                continue;
            }
            const float *bias = w->bias + (panel + p) * LANES;
            UNROLL for (int i = 0; i < LANES; i += WIDTH) {
                f32 gate = load(of_panel + i), up = load(of_panel + stride * LANES + i);
                if (w->bias) gate += load(bias + i), up += load(bias + LANES + i);
                store_kind(kind, y, r * y_stride + (panel + p) / 2 * LANES + i, gate / (1 + power_of_e(-gate)) * up);
            }
        }
    }
}

#define RUN(PANELS, ROWS)                                                                                              \
    do {                                                                                                               \
        float sums[PANELS][ROWS][LANES];                                                                               \
        tile_##PANELS##x##ROWS(w, kind, panel, x + row * inputs, x_sums + row * groups, sums);                         \
        finish(w, then, F32, panel, PANELS, ROWS, ROWS, &sums[0][0][0], y + row * y_stride, y_stride);                 \
    } while (0)

INLINE void multiply_kind(const Linear *w, int kind, enum then then, int64_t rows, const float *x, float *y,
                          int64_t y_stride) {
    const int64_t inputs = w->inputs, groups = inputs / GROUP, panels = (w->outputs + 2 * LANES - 1) / (2 * LANES) * 2;
    float x_sums[kind == INT4 ? rows * groups : 1];
    if (kind == INT4)
        for (int64_t i = 0; i < rows * groups; i++) {
            f32 sum = load(x + i * GROUP);
            for (int j = WIDTH; j < GROUP; j += WIDTH) sum += load(x + i * GROUP + j);
            x_sums[i] = add_up(sum);
        }
    const int64_t share = rows == 1 || rows >= 8 ? 8 : 4; /* panels that one thread takes at a time */
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < panels; first += share) {
        const int64_t end = first + share < panels ? first + share : panels;
        for (int64_t row = 0; row < rows;) {
            const int64_t left = rows - row;
            const int take = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            for (int64_t panel = first; panel < end;) {
                const int64_t width = end - panel;
                if (take == 8 && width >= 2) { RUN(2, 8); panel += 2; }
                else if (take == 4 && width >= 4) { RUN(4, 4); panel += 4; }
                else if (take == 4 && width >= 2) { RUN(2, 4); panel += 2; }
                else if (take == 2 && width >= 4) { RUN(4, 2); panel += 4; }
                else if (take == 2 && width >= 2) { RUN(2, 2); panel += 2; }
                else if (take == 1 && width >= 8) { RUN(8, 1); panel += 8; }
                else if (take == 1 && width >= 2) { RUN(2, 1); panel += 2; }
                else __builtin_unreachable();
            }
            row += take;
        }
    }
}

void multiply(const Linear *w, enum then then, int64_t rows, const float *x, float *y, int64_t y_stride) {
    switch (w->kind) {
        case F32: multiply_kind(w, F32, then, rows, x, y, y_stride); break;
        case BF16: multiply_kind(w, BF16, then, rows, x, y, y_stride); break;
        case INT8: multiply_kind(w, INT8, then, rows, x, y, y_stride); break;
        default: multiply_kind(w, INT4, then, rows, x, y, y_stride);
    }
}

/* ---- in bfloat16: weights are unpacked once for all rows ---- */

#ifdef __AVX512BF16__

/* Two numbers in one word, as bfloat16. */
INLINE u32 pair(f32 low, f32 high) { return round_bits(low) >> 16 | (round_bits(high) & 0xffff0000); }

/* Write two panels as bfloat16, which lie as weights of that kind do. */
INLINE void narrow_panels(const Linear *w, int kind, int64_t panel, uint32_t *words) {
    const int64_t inputs = w->inputs, groups = inputs / GROUP;
    const int in_word = per_word(kind), per_group = kind == INT4 ? 2 : 1; /* vectors of scales */
    for (int64_t g = panel * groups; g < (panel + 2) * groups; g++) {
        f32 v[GROUP];
        UNROLL for (int i = 0; i < GROUP; i += in_word) {
            const u32 word = load_words(w->weights + (g * GROUP + i) / in_word * LANES);
            UNROLL for (int j = 0; j < in_word; j++) v[i + j] = input_of(kind, word, j);
        }
        if (kind == INT8 || kind == INT4) {
            const f32 scale = load_f16(w->scales + g * per_group * LANES);
            const f32 minimum = kind == INT4 ? load_f16(w->scales + (g * per_group + 1) * LANES) : (f32){};
            UNROLL for (int i = 0; i < GROUP; i++) v[i] = v[i] * scale + minimum;
        }
        UNROLL for (int i = 0; i < GROUP; i += 2, words += LANES) {
            const u32 word = pair(v[i], v[i + 1]);
            memcpy(words, &word, sizeof word);
        }
    }
}

/* Two panels times TOKENS rows of bfloat16: sums[panel][row], 16 outputs each. */
INLINE void tile_narrow(int64_t inputs, const uint32_t *words, const uint16_t *x, f32 sums[2][TOKENS]) {
    const int64_t pairs = inputs / 2;
    f32 total[2][TOKENS] = {};
    for (int64_t k = 0; k < pairs; k++) {
        const __m512bh first = (__m512bh)load_words(words + k * LANES);
        const __m512bh second = (__m512bh)load_words(words + (pairs + k) * LANES);
        UNROLL for (int r = 0; r < TOKENS; r++) {
            uint32_t both;
            memcpy(&both, x + r * inputs + 2 * k, sizeof both);
            const __m512bh input = (__m512bh)((u32){} + both);
            total[0][r] = (f32)_mm512_dpbf16_ps((__m512)total[0][r], first, input);
            total[1][r] = (f32)_mm512_dpbf16_ps((__m512)total[1][r], second, input);
        }
    }
    memcpy(sums, total, sizeof total);
}

static void multiply_narrow(const Linear *w, enum then then, int64_t rows, const uint16_t *x, void *y,
                            int64_t y_stride, uint32_t *room) {
    const int64_t panels = (w->outputs + 2 * LANES - 1) / (2 * LANES) * 2;
    /* Two panels at a time: all rows are multiplied with them before the next are unpacked. */
#pragma omp for schedule(dynamic, 1)
    for (int64_t panel = 0; panel < panels; panel += 2) {
        switch (w->kind) {
            case F32: narrow_panels(w, F32, panel, room); break;
            case BF16: break; /* as they are wanted */
            case INT8: narrow_panels(w, INT8, panel, room); break;
            default: narrow_panels(w, INT4, panel, room);
        }
        const uint32_t *words = w->kind == BF16 ? w->weights + panel * w->inputs / 2 * LANES : room;
        for (int64_t row = 0; row < rows; row += TOKENS) {
            const int64_t take = rows - row < TOKENS ? rows - row : TOKENS;
            void *first = then == GATE ? (void *)((uint16_t *)y + row * y_stride) : (float *)y + row * y_stride;
            f32 sums[2][TOKENS];
            tile_narrow(w->inputs, words, x + row * w->inputs, sums);
            finish(w, then, BF16, panel, 2, take, TOKENS, (const float *)sums, first, y_stride);
        }
    }
}

#endif

void multiply_prompt(const Linear *w, enum then then, int kind, int64_t rows, const void *x, void *y, int64_t y_stride,
                     uint32_t *room) {
#ifdef __AVX512BF16__
    if (kind == BF16) {
        multiply_narrow(w, then, rows, x, y, y_stride, room);
        return;
    }
#endif
    (void)kind, (void)room;
    for (int64_t row = 0; row < rows; row += MAX_ROWS) {
        const int64_t take = rows - row < MAX_ROWS ? rows - row : MAX_ROWS;
        multiply(w, then, take, (const float *)x + row * w->inputs, (float *)y + row * y_stride, y_stride);
    }
}
