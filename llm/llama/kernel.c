/* One decode step of a Llama on a CPU, for any number of sequences: embeddings in, logits out.

   Weights are read once per step and unpacked in registers; everything is computed in float32. A row's sums are always
   added up in the same order, so that what a sequence gets does not depend on how many others are in the step.

   Written with GCC's vector extensions, so that the compiler takes what the machine has: AVX-512, AVX2, NEON.
   Its arrays come from `kernel.py`, which mirrors the structs below. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <omp.h>

#define LANES 16 /* outputs in a panel of weights, and tokens in a block of keys and values */
#define GROUP 32 /* inputs that share a scale in quantised weights */
#define SPAN 512 /* keys that one piece of attention covers */
#define MAX_HEAD_DIM 256

typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

enum kind { F32, BF16, INT8, INT4 };

/* A matrix of `outputs` x `inputs`, in panels of 16 outputs, an even number of them. Narrow weights lie in words of
   32 bits, one word an output with inputs that follow one another from its low end up: they are unpacked by shifts
   alone.
   F32    [panel][input][16]
   BF16   [panel][input / 2][16]
   INT8   [panel][input / 4][16], scales [panel][group][16]; weight = scale * q
   INT4   [panel][input / 8][16], scales [panel][group][2][16]; weight = scale * q + minimum
   Scales are float16. */
typedef struct {
    const uint32_t *weights;
    const uint16_t *scales;
    const float *bias; /* or NULL */
    int64_t outputs, inputs;
    int64_t kind;
    int64_t is_interleaved; /* panels of the two halves of the outputs take turns */
} Linear;

typedef struct {
    const float *attention_norm, *mlp_norm;
    Linear qkv, out, gate_up, down; /* gate_up is interleaved */
    void *keys;                     /* [block][kv head][dimension][16] */
    void *values;                   /* [block][kv head][16][dimension] */
} Layer;

typedef struct {
    int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate;
    int64_t kv_kind; /* F32 or BF16 */
    float epsilon;
    const float *cosines, *sines; /* [position][head_dim / 2] */
    const Layer *layers;
    const float *norm;
    Linear head;
} Model;

/* Rows that are in a step, and room to work in. What is small every thread computes for itself, in room of its own: that
   takes less time than waiting for the others. */
typedef struct {
    int64_t threads, rows;
    const int32_t *positions; /* of the token that is read: so many keys come before it */
    const int32_t *tables;    /* [row][max_blocks]: where its keys and values are */
    int64_t max_blocks;
    float *x;       /* [row][hidden]: embeddings in */
    float *normed;  /* [thread][row][hidden] */
    float *qkv;     /* [row][(heads + 2 * kv_heads) * head_dim] */
    float *partial; /* [row][head][span][head_dim + 2]: weighted values, highest score, sum of weights */
    float *mixed;   /* [thread][row][heads * head_dim] */
    float *mlp;     /* [row][intermediate] */
    float *logits;  /* [row][vocabulary] */
} Step;

/* ---- vectors ---- */

INLINE f32 load(const float *from) {
    f32 v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(float *to, f32 v) { memcpy(to, &v, sizeof v); }

INLINE f32 load_bf16(const uint16_t *from) {
    u16 v;
    memcpy(&v, from, sizeof v);
    return (f32)(__builtin_convertvector(v, u32) << 16);
}

INLINE u32 round_bits(f32 v) { /* the upper halves become bfloat16: to nearest, ties to even */
    const u32 bits = (u32)v;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

INLINE u16 to_bf16(f32 v) { return __builtin_convertvector(round_bits(v) >> 16, u16); }

INLINE f32 load_f16(const uint16_t *from) { /* finite numbers only */
    u16 v;
    memcpy(&v, from, sizeof v);
    u32 bits = __builtin_convertvector(v, u32);
    f32 size = (f32)((bits & 0x7fff) << 13) * 0x1p112f;
    return (f32)((u32)size | (bits & 0x8000) << 16);
}

INLINE f32 load_kind(int kind, const void *from, int64_t at) {
    return kind == BF16 ? load_bf16((const uint16_t *)from + at) : load((const float *)from + at);
}

INLINE u32 load_words(const uint32_t *from) {
    u32 v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* Inputs in a word of weights. */
INLINE int per_word(int kind) { return kind == F32 ? 1 : kind == BF16 ? 2 : kind == INT8 ? 4 : 8; }

/* The `i`th input of words: a weight, or the whole number that stands for it in its group. */
INLINE f32 input_of(int kind, u32 words, int i) {
    switch (kind) {
        case F32: return (f32)words;
        case BF16: return (f32)(i ? words & 0xffff0000 : words << 16);
        case INT8: return __builtin_convertvector((i32)(words << (24 - 8 * i)) >> 24, f32);
        default: return __builtin_convertvector((i32)(words >> 4 * i & 15), f32);
    }
}

INLINE float add_up(f32 v) {
    float sums[LANES];
    memcpy(sums, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0];
}

INLINE f32 greater(f32 a, f32 b) {
    const i32 first = a > b;
    return (f32)(((i32)a & first) | ((i32)b & ~first));
}

INLINE f32 clamp(f32 v, float low, float high) {
    v = greater(v, (f32){} + low);
    return -greater(-v, (f32){} - high);
}

/* e to the power of x; relative error below 2e-7. Polynomial of Cephes' expf (S. Moshier). */
INLINE f32 power_of_e(f32 x) {
    x = clamp(x, -87.0f, 88.0f);
    f32 n = x * 1.44269504088896341f + 0x1.8p23f;
    i32 exponent = (i32)n << 23;
    n -= 0x1.8p23f;
    x -= n * 0.693359375f;
    x += n * 2.12194440e-4f;
    f32 y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1;
    return (f32)((i32)y + exponent);
}

/* ---- products with weights ---- */

/* What becomes of a product. */
enum then { SET, ADD, GATE }; /* y = p; y += p; y = silu(gate) * up */

/* `PANELS` panels times `ROWS` rows: sums[panel][row], 16 outputs each. */
#define TILE(PANELS, ROWS)                                                                                             \
    INLINE void tile_##PANELS##x##ROWS(const Linear *w, int kind, int64_t panel, const float *x, const float *x_sums,  \
                                       f32 sums[PANELS][ROWS]) {                                                       \
        const int64_t inputs = w->inputs, groups = inputs / GROUP, in_word = per_word(kind);                           \
        const int64_t stride = inputs / in_word * LANES;                                                               \
        const uint32_t *words = w->weights + panel * stride;                                                           \
        f32 total[PANELS][ROWS] = {};                                                                                  \
        if (kind == F32 || kind == BF16) {                                                                             \
            for (int64_t k = 0; k < inputs; k += in_word, words += LANES)                                              \
                UNROLL for (int p = 0; p < PANELS; p++) {                                                              \
                    const u32 word = load_words(words + p * stride);                                                   \
                    UNROLL for (int i = 0; i < in_word; i++) {                                                         \
                        const f32 weight = input_of(kind, word, i);                                                    \
                        UNROLL for (int r = 0; r < ROWS; r++) total[p][r] += weight * x[r * inputs + k + i];           \
                    }                                                                                                  \
                }                                                                                                      \
        } else {                                                                                                       \
            const int per_group = kind == INT8 ? 1 : 2; /* vectors of scales */                                        \
            for (int64_t g = 0; g < groups; g++) {                                                                     \
                f32 part[PANELS][ROWS] = {};                                                                           \
                for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += in_word, words += LANES)                         \
                    UNROLL for (int i = 0; i < in_word; i++)                                                           \
                        UNROLL for (int p = 0; p < PANELS; p++) {                                                      \
                            const f32 q = input_of(kind, load_words(words + p * stride), i);                           \
                            UNROLL for (int r = 0; r < ROWS; r++) part[p][r] += q * x[r * inputs + k + i];             \
                        }                                                                                              \
                UNROLL for (int p = 0; p < PANELS; p++) {                                                              \
                    const uint16_t *scales = w->scales + ((panel + p) * groups + g) * per_group * LANES;               \
                    const f32 scale = load_f16(scales);                                                                \
                    UNROLL for (int r = 0; r < ROWS; r++) total[p][r] += scale * part[p][r];                           \
                    if (kind == INT4) {                                                                                \
                        const f32 minimum = load_f16(scales + LANES);                                                  \
                        UNROLL for (int r = 0; r < ROWS; r++) total[p][r] += minimum * x_sums[r * groups + g];         \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        memcpy(sums, total, sizeof total);                                                                             \
    }

TILE(8, 1)
TILE(2, 1)
TILE(4, 2)
TILE(2, 2)
TILE(4, 4)
TILE(2, 4)
TILE(2, 8)

INLINE void put(const Linear *w, enum then then, int64_t panel, f32 sum, float *y) {
    if (w->bias) sum += load(w->bias + panel * LANES);
    if ((panel + 1) * LANES > w->outputs) { /* the last panels are filled up with zeros */
        float rest[LANES];
        store(rest, sum);
        for (int64_t i = panel * LANES; i < w->outputs; i++) y[i] = rest[i - panel * LANES];
    } else {
        store(y + panel * LANES, then == ADD ? load(y + panel * LANES) + sum : sum);
    }
}

/* Finish `panels` x `rows` sums, which begin at `panel` and at `y`. */
INLINE void finish(const Linear *w, enum then then, int64_t panel, int panels, int rows, const f32 *sums, float *y,
                   int64_t y_stride) {
    for (int r = 0; r < rows; r++) {
        float *row = y + r * y_stride;
        if (then == GATE) {
            for (int p = 0; p < panels; p += 2) {
                f32 gate = sums[p * rows + r], up = sums[(p + 1) * rows + r];
                if (w->bias) gate += load(w->bias + (panel + p) * LANES), up += load(w->bias + (panel + p + 1) * LANES);
                store(row + (panel + p) / 2 * LANES, gate / (1 + power_of_e(-gate)) * up);
            }
        } else {
            for (int p = 0; p < panels; p++) put(w, then, panel + p, sums[p * rows + r], row);
        }
    }
}

#define RUN(PANELS, ROWS)                                                                                              \
    do {                                                                                                               \
        f32 sums[PANELS][ROWS];                                                                                        \
        tile_##PANELS##x##ROWS(w, kind, panel, x + row * inputs, x_sums + row * groups, sums);                         \
        finish(w, then, panel, PANELS, ROWS, &sums[0][0], y + row * y_stride, y_stride);                               \
    } while (0)

/* y = x w' for all rows; called by all threads of a team, which share the panels. */
INLINE void multiply_kind(const Linear *w, int kind, enum then then, int64_t rows, const float *x, float *y,
                          int64_t y_stride) {
    const int64_t inputs = w->inputs, groups = inputs / GROUP, panels = (w->outputs + 2 * LANES - 1) / (2 * LANES) * 2;
    float x_sums[kind == INT4 ? rows * groups : 1];
    if (kind == INT4)
        for (int64_t i = 0; i < rows * groups; i++)
            x_sums[i] = add_up(load(x + i * GROUP) + load(x + i * GROUP + GROUP / 2));
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < panels; first += 8) {
        const int64_t end = first + 8 < panels ? first + 8 : panels;
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

static void multiply(const Linear *w, enum then then, int64_t rows, const float *x, float *y, int64_t y_stride) {
    switch (w->kind) {
        case F32: multiply_kind(w, F32, then, rows, x, y, y_stride); break;
        case BF16: multiply_kind(w, BF16, then, rows, x, y, y_stride); break;
        case INT8: multiply_kind(w, INT8, then, rows, x, y, y_stride); break;
        default: multiply_kind(w, INT4, then, rows, x, y, y_stride);
    }
}

/* ---- the rest of a layer ---- */

/* y = x over its root mean square, times weight; every thread does all rows. */
static void normalise(const Model *model, const float *weight, int64_t rows, const float *x, float *y) {
    const int64_t hidden = model->hidden;
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * hidden;
        f32 squares = {};
        for (int64_t i = 0; i < hidden; i += LANES) squares += load(from + i) * load(from + i);
        const float scale = 1 / sqrtf(add_up(squares) / hidden + model->epsilon);
        for (int64_t i = 0; i < hidden; i += LANES)
            store(y + row * hidden + i, load(from + i) * scale * load(weight + i));
    }
}

/* Turn a head by its position and scale it. */
INLINE void turn(const Model *model, int64_t position, float scale, const float *head, float *turned) {
    const int64_t half = model->head_dim / 2;
    const float *cosines = model->cosines + position * half, *sines = model->sines + position * half;
    for (int64_t i = 0; i < half; i++) {
        const float a = head[i] * scale, b = head[i + half] * scale;
        turned[i] = a * cosines[i] - b * sines[i];
        turned[i + half] = b * cosines[i] + a * sines[i];
    }
}

/* Put a row's key and value of one head into their block. */
static void place(const Model *model, const Layer *layer, const Step *step, int64_t row, int64_t kv_head) {
    const int64_t size = model->head_dim, position = step->positions[row], slot = position % LANES;
    const float *heads = step->qkv + row * (model->heads + 2 * model->kv_heads) * size;
    const float *value = heads + (model->heads + model->kv_heads + kv_head) * size;
    float key[MAX_HEAD_DIM];
    turn(model, position, 1, heads + (model->heads + kv_head) * size, key);
    const int64_t block = step->tables[row * step->max_blocks + position / LANES];
    const int64_t at = (block * model->kv_heads + kv_head) * size * LANES;
    if (model->kv_kind == BF16) {
        for (int64_t i = 0; i < size; i += LANES) {
            const u16 narrow_key = to_bf16(load(key + i)), narrow_value = to_bf16(load(value + i));
            for (int64_t j = 0; j < LANES; j++) ((uint16_t *)layer->keys)[at + (i + j) * LANES + slot] = narrow_key[j];
            memcpy((uint16_t *)layer->values + at + slot * size + i, &narrow_value, sizeof narrow_value);
        }
    } else {
        for (int64_t i = 0; i < size; i++) ((float *)layer->keys)[at + i * LANES + slot] = key[i];
        memcpy((float *)layer->values + at + slot * size, value, size * sizeof(float));
    }
}

/* Values of `WIDTH` vectors of dimensions from `i` on, weighted and added up. */
#define WEIGH(GROUPED, WIDTH)                                                                                          \
    {                                                                                                                  \
        f32 mixed[GROUPED][WIDTH] = {};                                                                                \
        for (int64_t t = 0; t < length; t++) {                                                                         \
            const int64_t at =                                                                                         \
                ((table[(first + t) / LANES] * model->kv_heads + kv_head) * LANES + t % LANES) * size + i;             \
            UNROLL for (int j = 0; j < WIDTH; j++) {                                                                   \
                const f32 value = load_kind(kind, layer->values, at + j * LANES);                                      \
                UNROLL for (int g = 0; g < GROUPED; g++) mixed[g][j] += value * scores[g][t];                          \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int g = 0; g < GROUPED; g++)                                                                       \
            UNROLL for (int j = 0; j < WIDTH; j++) store(out + g * out_stride + i + j * LANES, mixed[g][j]);           \
    }

/* Queries of `GROUPED` heads, which share a key-value head, over the keys `first` to `end` of a row. Blocks of keys are
   taken four at a time, and values 64 dimensions at a time: sums that do not wait for one another. */
#define ATTEND(GROUPED)                                                                                                \
    INLINE void attend_##GROUPED(const Model *model, const Layer *layer, int kind, const int32_t *table,               \
                                 int64_t kv_head, const float *queries, int64_t first, int64_t end, float *out,        \
                                 int64_t out_stride) {                                                                 \
        const int64_t size = model->head_dim, length = end - first;                                                    \
        float scores[GROUPED][SPAN] __attribute__((aligned(64)));                                                      \
        f32 highest[GROUPED];                                                                                          \
        UNROLL for (int g = 0; g < GROUPED; g++) highest[g] = (f32){} - INFINITY;                                      \
        for (int64_t t = 0; t < length; t += 4 * LANES) {                                                              \
            int64_t at[4];                                                                                             \
            UNROLL for (int j = 0; j < 4; j++) {                                                                       \
                const int64_t key = t + j * LANES < length ? t + j * LANES : t; /* beyond the end: computed in vain */ \
                at[j] = (table[(first + key) / LANES] * model->kv_heads + kv_head) * size * LANES;                     \
            }                                                                                                          \
            f32 score[4][GROUPED] = {};                                                                                \
            for (int64_t i = 0; i < size; i++)                                                                         \
                UNROLL for (int j = 0; j < 4; j++) {                                                                   \
                    const f32 key = load_kind(kind, layer->keys, at[j] + i * LANES);                                   \
                    UNROLL for (int g = 0; g < GROUPED; g++) score[j][g] += key * queries[g * size + i];               \
                }                                                                                                      \
            UNROLL for (int j = 0; j < 4; j++)                                                                         \
                UNROLL for (int g = 0; g < GROUPED; g++) {                                                             \
                    float masked[LANES];                                                                               \
                    store(masked, score[j][g]);                                                                        \
                    for (int64_t i = length - t - j * LANES; i < LANES; i++) masked[i < 0 ? 0 : i] = -INFINITY;        \
                    const f32 kept = length - t - j * LANES < LANES ? load(masked) : score[j][g];                      \
                    store(scores[g] + t + j * LANES, kept);                                                            \
                    highest[g] = greater(highest[g], kept);                                                            \
                }                                                                                                      \
        }                                                                                                              \
        UNROLL for (int g = 0; g < GROUPED; g++) {                                                                     \
            float most = highest[g][0];                                                                                \
            for (int i = 1; i < LANES; i++) most = highest[g][i] > most ? highest[g][i] : most;                        \
            f32 sum = {};                                                                                              \
            for (int64_t t = 0; t < length; t += LANES) {                                                              \
                const f32 weight = power_of_e(load(scores[g] + t) - most);                                             \
                store(scores[g] + t, weight);                                                                          \
                sum += weight;                                                                                         \
            }                                                                                                          \
            out[g * out_stride + size] = most;                                                                         \
            out[g * out_stride + size + 1] = add_up(sum);                                                              \
        }                                                                                                              \
        if (size % (4 * LANES) == 0)                                                                                   \
            for (int64_t i = 0; i < size; i += 4 * LANES)                                                              \
                WEIGH(GROUPED, 4)                                                                                      \
        else                                                                                                           \
            for (int64_t i = 0; i < size; i += LANES)                                                                  \
                WEIGH(GROUPED, 1)                                                                                      \
    }

ATTEND(4)
ATTEND(3)
ATTEND(2)
ATTEND(1)

static int64_t num_spans(int64_t keys) { return (keys + SPAN - 1) / SPAN; }

/* Attention of all rows in pieces: a row, a key-value head, a span of keys. The piece with the last span, which its own
   key belongs to, puts that in its place first. */
static void attend(const Model *model, const Layer *layer, const Step *step, int64_t most_spans) {
    const int64_t size = model->head_dim, stride = (model->heads + 2 * model->kv_heads) * size;
    const int64_t shared = model->heads / model->kv_heads, entry = size + 2, out_stride = most_spans * entry;
    const float scale = 1 / sqrtf(size);
#pragma omp for schedule(dynamic, 1) collapse(3)
    for (int64_t span = 0; span < most_spans; span++)
        for (int64_t row = 0; row < step->rows; row++)
            for (int64_t kv_head = 0; kv_head < model->kv_heads; kv_head++) {
                const int64_t position = step->positions[row], keys = position + 1, first = span * SPAN;
                if (first >= keys) continue;
                const int64_t end = first + SPAN < keys ? first + SPAN : keys;
                if (end == keys) place(model, layer, step, row, kv_head);
                const int32_t *table = step->tables + row * step->max_blocks;
                for (int64_t g = 0; g < shared;) {
                    const int64_t head = kv_head * shared + g, left = shared - g;
                    const int64_t take = left < 4 ? left : 4;
                    float queries[4 * MAX_HEAD_DIM];
                    for (int64_t i = 0; i < take; i++)
                        turn(model, position, scale, step->qkv + row * stride + (head + i) * size, queries + i * size);
                    float *out = step->partial + (row * model->heads + head) * out_stride + span * entry;
#define TAKE(N)                                                                                                        \
    if (model->kv_kind == BF16)                                                                                        \
        attend_##N(model, layer, BF16, table, kv_head, queries, first, end, out, out_stride);                          \
    else                                                                                                               \
        attend_##N(model, layer, F32, table, kv_head, queries, first, end, out, out_stride)
                    switch (take) {
                        case 4: TAKE(4); break;
                        case 3: TAKE(3); break;
                        case 2: TAKE(2); break;
                        default: TAKE(1);
                    }
                    g += take;
                }
            }
}

/* Put the pieces of attention together; every thread does all rows. */
static void combine(const Model *model, const Step *step, int64_t most_spans, float *mixed) {
    const int64_t size = model->head_dim, entry = size + 2;
    for (int64_t i = 0; i < step->rows * model->heads; i++, mixed += size) {
        const int64_t spans = num_spans(step->positions[i / model->heads] + 1);
        const float *parts = step->partial + i * most_spans * entry;
        float most = parts[size], sum = 0;
        for (int64_t span = 1; span < spans; span++) most = fmaxf(most, parts[span * entry + size]);
        memset(mixed, 0, size * sizeof(float));
        for (int64_t span = 0; span < spans; span++) {
            const float *part = parts + span * entry, weight = spans == 1 ? 1 : expf(part[size] - most);
            sum += weight * part[size + 1];
            for (int64_t d = 0; d < size; d++) mixed[d] += weight * part[d];
        }
        for (int64_t d = 0; d < size; d++) mixed[d] /= sum;
    }
}

void decode(const Model *model, const Step *step) {
    const int64_t rows = step->rows, heads = model->heads * model->head_dim;
    const int64_t qkv = heads + 2 * model->kv_heads * model->head_dim;
    int64_t most_spans = 1;
    for (int64_t row = 0; row < rows; row++)
        if (num_spans(step->positions[row] + 1) > most_spans) most_spans = num_spans(step->positions[row] + 1);
#pragma omp parallel num_threads(step->threads)
    {
        float *normed = step->normed + omp_get_thread_num() * rows * model->hidden;
        float *mixed = step->mixed + omp_get_thread_num() * rows * heads;
        for (int64_t i = 0; i < model->num_layers; i++) {
            const Layer *layer = model->layers + i;
            normalise(model, layer->attention_norm, rows, step->x, normed);
            multiply(&layer->qkv, SET, rows, normed, step->qkv, qkv);
            attend(model, layer, step, most_spans);
            combine(model, step, most_spans, mixed);
            multiply(&layer->out, ADD, rows, mixed, step->x, model->hidden);
            normalise(model, layer->mlp_norm, rows, step->x, normed);
            multiply(&layer->gate_up, GATE, rows, normed, step->mlp, model->intermediate);
            multiply(&layer->down, ADD, rows, step->mlp, step->x, model->hidden);
        }
        normalise(model, model->norm, rows, step->x, normed);
        multiply(&model->head, SET, rows, normed, step->logits, model->head.outputs);
    }
}

/* ---- back to plain matrices ---- */

/* Turn 16 rows of 16 into 16 columns. */
INLINE void transpose(f32 v[LANES]) {
    UNROLL for (int width = 1; width < LANES; width *= 2) {
        i32 low, high;
        for (int lane = 0; lane < LANES; lane++) {
            low[lane] = lane & width ? LANES + lane - width : lane;
            high[lane] = lane & width ? LANES + lane : lane + width;
        }
        UNROLL for (int i = 0; i < LANES; i++) {
            if (i & width) continue;
            f32 a = v[i], b = v[i + width];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + width] = __builtin_shuffle(a, b, high);
        }
    }
}

/* Two rows of bfloat16 in one of 32-bit words. */
INLINE f32 pair(f32 low, f32 high) { return (f32)(round_bits(low) >> 16 | (round_bits(high) & 0xffff0000)); }

INLINE void unpack_kind(const Linear *w, int kind, int out_kind, void *out) {
    const int64_t inputs = w->inputs, groups = inputs / GROUP, panels = (w->outputs + LANES - 1) / LANES;
    const int in_word = per_word(kind), width = out_kind == BF16 ? GROUP : LANES; /* inputs in 64 bytes */
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t row = w->is_interleaved ? panel / 2 * LANES + panel % 2 * (w->outputs / 2) : panel * LANES;
        const int64_t rows = panel * LANES + LANES > w->outputs ? w->outputs - panel * LANES : LANES;
        for (int64_t k = 0; k < inputs; k += width) {
            f32 v[GROUP];
            UNROLL for (int i = 0; i < width; i += in_word) {
                const u32 words = load_words(w->weights + (panel * inputs + k + i) / in_word * LANES);
                UNROLL for (int j = 0; j < in_word; j++) v[i + j] = input_of(kind, words, j);
            }
            if (kind == INT8 || kind == INT4) {
                const int per_group = kind == INT8 ? 1 : 2;
                const uint16_t *scales = w->scales + (panel * groups + k / GROUP) * per_group * LANES;
                const f32 scale = load_f16(scales), minimum = kind == INT4 ? load_f16(scales + LANES) : (f32){};
                UNROLL for (int i = 0; i < width; i++) v[i] = v[i] * scale + minimum;
            }
            if (out_kind == BF16) UNROLL for (int i = 0; i < LANES; i++) v[i] = pair(v[2 * i], v[2 * i + 1]);
            transpose(v);
            for (int64_t i = 0; i < rows; i++) store((float *)out + ((row + i) * inputs + k) * LANES / width, v[i]);
        }
    }
}

/* Write the matrix as [output][input] of `out_kind`. */
void unpack(const Linear *w, int64_t out_kind, void *out) {
    switch (w->kind) {
        case F32: unpack_kind(w, F32, out_kind, out); break;
        case BF16: unpack_kind(w, BF16, out_kind, out); break;
        case INT8: unpack_kind(w, INT8, out_kind, out); break;
        default: unpack_kind(w, INT4, out_kind, out);
    }
}
