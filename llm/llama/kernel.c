/* A Llama's forward on a CPU: a decode step for any number of sequences, and a piece of one sequence's prompt.

   A step reads the weights once and unpacks them in registers; everything is computed in float32. A prompt multiplies
   bfloat16 numbers, where keys and values are bfloat16 and the machine has instructions for it. Sums are always added
   up in the same order, so that what a sequence gets does not depend on how many others are in the step, nor on how
   its prompt was cut.

   Written with GCC's vector extensions, so that the compiler takes what the machine has: AVX-512, AVX2, NEON.
   Its arrays come from `kernel.py`, which mirrors the structs below. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <omp.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16 /* outputs in a panel of weights, and tokens in a block of keys and values */
#define GROUP 32 /* inputs that share a scale in quantised weights */
#define SPAN 512 /* keys that one piece of attention covers */
#define MAX_HEAD_DIM 256
#define TOKENS 12 /* of a prompt, that are worked on at once */
#define MAX_ROWS 64 /* in one product of float32: threads keep sums of their inputs on their stacks */

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

/* Tokens of one sequence, which follow one another, and room to work in. */
typedef struct {
    int64_t threads, rows, start; /* how many, and the position of the first */
    const int32_t *table;         /* where the sequence's keys and values are */
    float *x;                     /* [row][hidden]: embeddings in */
    float *qkv;                   /* [row][(heads + 2 * kv_heads) * head_dim] */
    void *input, *mlp; /* what is multiplied, float32 or bfloat16, rows filled up to a multiple of TOKENS:
                          [row][hidden] or [row][heads * head_dim]; [row][intermediate] */
} Prompt;

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

/* Have it read from memory meanwhile. */
INLINE void fetch(int kind, const void *from, int64_t at) {
    __builtin_prefetch((const char *)from + at * (kind == BF16 ? 2 : 4));
}

INLINE void store_kind(int kind, void *to, int64_t at, f32 v) {
    if (kind == BF16) {
        const u16 narrow = to_bf16(v);
        memcpy((uint16_t *)to + at, &narrow, sizeof narrow);
    } else {
        store((float *)to + at, v);
    }
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

/* Finish the first `rows` of `panels` x `stride` sums, which begin at `panel`; y begins at their first row. `kind` is
   how GATE stores. */
INLINE void finish(const Linear *w, enum then then, int kind, int64_t panel, int panels, int64_t rows, int64_t stride,
                   const f32 *sums, void *y, int64_t y_stride) {
    for (int64_t r = 0; r < rows; r++) {
        if (then == GATE) {
            for (int p = 0; p < panels; p += 2) {
                f32 gate = sums[p * stride + r], up = sums[(p + 1) * stride + r];
                if (w->bias) gate += load(w->bias + (panel + p) * LANES), up += load(w->bias + (panel + p + 1) * LANES);
                store_kind(kind, y, r * y_stride + (panel + p) / 2 * LANES, gate / (1 + power_of_e(-gate)) * up);
            }
        } else {
            for (int p = 0; p < panels; p++) put(w, then, panel + p, sums[p * stride + r], (float *)y + r * y_stride);
        }
    }
}

#define RUN(PANELS, ROWS)                                                                                              \
    do {                                                                                                               \
        f32 sums[PANELS][ROWS];                                                                                        \
        tile_##PANELS##x##ROWS(w, kind, panel, x + row * inputs, x_sums + row * groups, sums);                         \
        finish(w, then, F32, panel, PANELS, ROWS, ROWS, &sums[0][0], y + row * y_stride, y_stride);                   \
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

/* y = x over its root mean square, times weight. */
static void normalise(const Model *model, const float *weight, const float *x, int kind, void *y, int64_t row) {
    const int64_t hidden = model->hidden;
    const float *from = x + row * hidden;
    f32 squares = {};
    for (int64_t i = 0; i < hidden; i += LANES) squares += load(from + i) * load(from + i);
    const float scale = 1 / sqrtf(add_up(squares) / hidden + model->epsilon);
    for (int64_t i = 0; i < hidden; i += LANES)
        store_kind(kind, y, row * hidden + i, load(from + i) * scale * load(weight + i));
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

/* Put a token's key and value of one head into their block; `heads` are the token's queries, keys and values. */
static void place(const Model *model, const Layer *layer, const int32_t *table, int64_t position, int64_t kv_head,
                  const float *heads) {
    const int64_t size = model->head_dim, slot = position % LANES;
    const float *value = heads + (model->heads + model->kv_heads + kv_head) * size;
    float key[MAX_HEAD_DIM];
    turn(model, position, 1, heads + (model->heads + kv_head) * size, key);
    const int64_t at = (table[position / LANES] * model->kv_heads + kv_head) * size * LANES;
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
            int64_t at[4], soon[4];                                                                                    \
            UNROLL for (int j = 0; j < 4; j++) {                                                                       \
                const int64_t key = t + j * LANES < length ? t + j * LANES : t; /* beyond the end: computed in vain */ \
                at[j] = (table[(first + key) / LANES] * model->kv_heads + kv_head) * size * LANES;                     \
                const int64_t later = key + 4 * LANES < length ? key + 4 * LANES : key;                                \
                soon[j] = (table[(first + later) / LANES] * model->kv_heads + kv_head) * size * LANES;                 \
            }                                                                                                          \
            f32 score[4][GROUPED] = {};                                                                                \
            for (int64_t i = 0; i < size; i++)                                                                         \
                UNROLL for (int j = 0; j < 4; j++) {                                                                   \
                    fetch(kind, layer->values, at[j] + i * LANES);                                                     \
                    fetch(kind, layer->keys, soon[j] + i * LANES);                                                     \
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
                const int32_t *table = step->tables + row * step->max_blocks;
                const float *heads = step->qkv + row * stride;
                if (end == keys) place(model, layer, table, position, kv_head, heads);
                for (int64_t g = 0; g < shared;) {
                    const int64_t head = kv_head * shared + g, left = shared - g;
                    const int64_t take = left < 4 ? left : 4;
                    float queries[4 * MAX_HEAD_DIM];
                    for (int64_t i = 0; i < take; i++)
                        turn(model, position, scale, heads + (head + i) * size, queries + i * size);
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
            for (int64_t row = 0; row < rows; row++) normalise(model, layer->attention_norm, step->x, F32, normed, row);
            multiply(&layer->qkv, SET, rows, normed, step->qkv, qkv);
            attend(model, layer, step, most_spans);
            combine(model, step, most_spans, mixed);
            multiply(&layer->out, ADD, rows, mixed, step->x, model->hidden);
            for (int64_t row = 0; row < rows; row++) normalise(model, layer->mlp_norm, step->x, F32, normed, row);
            multiply(&layer->gate_up, GATE, rows, normed, step->mlp, model->intermediate);
            multiply(&layer->down, ADD, rows, step->mlp, step->x, model->hidden);
        }
        for (int64_t row = 0; row < rows; row++) normalise(model, model->norm, step->x, F32, normed, row);
        multiply(&model->head, SET, rows, normed, step->logits, model->head.outputs);
    }
}

/* ---- reading a prompt ---- */

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
                            int64_t y_stride) {
    const int64_t panels = (w->outputs + 2 * LANES - 1) / (2 * LANES) * 2;
    uint32_t room[w->kind == BF16 ? 1 : w->inputs * LANES];
#pragma omp for schedule(dynamic, 1)
    for (int64_t panel = 0; panel < panels; panel += 2) {
        const uint32_t *words = room;
        switch (w->kind) {
            case F32: narrow_panels(w, F32, panel, room); break;
            case BF16: words = w->weights + panel * w->inputs / 2 * LANES; break;
            case INT8: narrow_panels(w, INT8, panel, room); break;
            default: narrow_panels(w, INT4, panel, room);
        }
        for (int64_t row = 0; row < rows; row += TOKENS) {
            f32 sums[2][TOKENS];
            const int64_t left = rows - row;
            tile_narrow(w->inputs, words, x + row * w->inputs, sums);
            if (then == GATE)
                finish(w, then, BF16, panel, 2, left < TOKENS ? left : TOKENS, TOKENS, &sums[0][0],
                       (uint16_t *)y + row * y_stride, y_stride);
            else
                finish(w, then, F32, panel, 2, left < TOKENS ? left : TOKENS, TOKENS, &sums[0][0],
                       (float *)y + row * y_stride, y_stride);
        }
    }
}

#endif

int64_t input_kind(int64_t kv_kind) {
#ifdef __AVX512BF16__
    return kv_kind;
#else
    (void)kv_kind;
    return F32;
#endif
}

/* y = x w' for all rows of a prompt; x is of the kind of inputs, and y too if it is for the next product (GATE). */
static void product(const Model *model, const Linear *w, enum then then, int64_t rows, const void *x, void *y,
                    int64_t y_stride) {
#ifdef __AVX512BF16__
    if (model->kv_kind == BF16) {
        multiply_narrow(w, then, rows, x, y, y_stride);
        return;
    }
#endif
    for (int64_t row = 0; row < rows; row += MAX_ROWS)
        multiply(w, then, rows - row < MAX_ROWS ? rows - row : MAX_ROWS, (const float *)x + row * w->inputs,
                 (float *)y + row * y_stride, y_stride);
}

/* `WIDTH` vectors of values from dimension `i` on, weighted and added to `out` [token][head_dim]. */
#define WEIGH_TILE(WIDTH)                                                                                              \
    {                                                                                                                  \
        f32 mixed[TOKENS][WIDTH];                                                                                      \
        UNROLL for (int r = 0; r < TOKENS; r++)                                                                        \
            UNROLL for (int j = 0; j < WIDTH; j++) mixed[r][j] = load(out[r] + i + j * LANES) * fade[r];               \
        for (int64_t t = 0; t < length; t++) {                                                                         \
            const int64_t block = table[(span + t) / LANES] * model->kv_heads + kv_head;                               \
            UNROLL for (int j = 0; j < WIDTH; j++) {                                                                   \
                const f32 value = load_kind(kind, layer->values, (block * LANES + t % LANES) * size + i + j * LANES);  \
                UNROLL for (int r = 0; r < TOKENS; r++) mixed[r][j] += value * scores[r][t];                           \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int r = 0; r < TOKENS; r++)                                                                        \
            UNROLL for (int j = 0; j < WIDTH; j++) store(out[r] + i + j * LANES, mixed[r][j]);                         \
    }

/* One head of up to TOKENS tokens, over all keys up to themselves. A span of keys at a time: what was weighted before
   fades when a higher score comes (Milakov & Gimelshein 2018, arXiv:1805.02867). */
INLINE void read_tile(const Model *model, const Layer *layer, int kind, int input_kind, const Prompt *prompt,
                      int64_t row, int64_t head) {
    const int64_t size = model->head_dim, stride = (model->heads + 2 * model->kv_heads) * size;
    const int64_t kv_head = head / (model->heads / model->kv_heads), start = prompt->start + row;
    const int64_t rows = prompt->rows - row < TOKENS ? prompt->rows - row : TOKENS, end = start + rows;
    const int32_t *table = prompt->table;
    float queries[TOKENS][MAX_HEAD_DIM] = {}, out[TOKENS][MAX_HEAD_DIM] = {};
    float scores[TOKENS][SPAN + LANES] __attribute__((aligned(64))); /* not at distances that share a place in caches */
    float highest[TOKENS], sums[TOKENS] = {}, fade[TOKENS];
    i32 lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    for (int r = 0; r < TOKENS; r++) highest[r] = -INFINITY;
    for (int r = 0; r < rows; r++)
        turn(model, start + r, 1 / sqrtf(size), prompt->qkv + (row + r) * stride + head * size, queries[r]);
    for (int64_t span = 0; span < end; span += SPAN) {
        const int64_t length = end - span < SPAN ? end - span : SPAN;
        for (int64_t t = 0; t < length; t += 2 * LANES) {
            const int64_t next = t + LANES < length ? t + LANES : t; /* beyond the end: computed in vain */
            const int64_t at = (table[(span + t) / LANES] * model->kv_heads + kv_head) * size * LANES;
            const int64_t next_at = (table[(span + next) / LANES] * model->kv_heads + kv_head) * size * LANES;
            f32 score[2][TOKENS] = {};
            for (int64_t i = 0; i < size; i++) {
                const f32 key = load_kind(kind, layer->keys, at + i * LANES);
                const f32 next_key = load_kind(kind, layer->keys, next_at + i * LANES);
                UNROLL for (int r = 0; r < TOKENS; r++) {
                    score[0][r] += key * queries[r][i];
                    score[1][r] += next_key * queries[r][i];
                }
            }
            UNROLL for (int j = 0; j < 2; j++)
                UNROLL for (int r = 0; r < TOKENS; r++) {
                    const i32 is_known = lanes + (int)(span + t + j * LANES - start) <= r;
                    const f32 none = (f32){} - INFINITY;
                    store(scores[r] + t + j * LANES, (f32)(((i32)score[j][r] & is_known) | ((i32)none & ~is_known)));
                }
        }
        for (int r = 0; r < TOKENS; r++) {
            f32 greatest = (f32){} - INFINITY, sum = {};
            for (int64_t t = 0; t < length; t += LANES) greatest = greater(greatest, load(scores[r] + t));
            float most = highest[r];
            for (int i = 0; i < LANES; i++) most = greatest[i] > most ? greatest[i] : most;
            for (int64_t t = 0; t < length; t += LANES) {
                const f32 score = load(scores[r] + t);
                const i32 is_known = score > (f32){} - INFINITY;
                const f32 weight = (f32)((i32)power_of_e(score - most) & is_known);
                store(scores[r] + t, weight);
                sum += weight;
            }
            fade[r] = expf(highest[r] - most);
            sums[r] = sums[r] * fade[r] + add_up(sum);
            highest[r] = most;
        }
        if (size % (2 * LANES) == 0)
            for (int64_t i = 0; i < size; i += 2 * LANES)
                WEIGH_TILE(2)
        else
            for (int64_t i = 0; i < size; i += LANES)
                WEIGH_TILE(1)
    }
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < size; i += LANES)
            store_kind(input_kind, prompt->input, ((row + r) * model->heads + head) * size + i,
                       load(out[r] + i) / sums[r]);
}

INLINE void read_all(const Model *model, const Layer *layer, int kind, int input_kind, const Prompt *prompt) {
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (int64_t row = 0; row < prompt->rows; row += TOKENS)
        for (int64_t head = 0; head < model->heads; head++)
            read_tile(model, layer, kind, input_kind, prompt, row, head);
}

/* Compute keys and values, and put them into their blocks. */
void prefill(const Model *model, const Prompt *prompt) {
    const int64_t rows = prompt->rows, qkv = (model->heads + 2 * model->kv_heads) * model->head_dim;
    const int kind = input_kind(model->kv_kind);
#pragma omp parallel num_threads(prompt->threads)
    for (int64_t i = 0; i < model->num_layers; i++) {
        const Layer *layer = model->layers + i;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) normalise(model, layer->attention_norm, prompt->x, kind, prompt->input, row);
        product(model, &layer->qkv, SET, rows, prompt->input, prompt->qkv, qkv);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t kv_head = 0; kv_head < model->kv_heads; kv_head++)
                place(model, layer, prompt->table, prompt->start + row, kv_head, prompt->qkv + row * qkv);
        if (i == model->num_layers - 1) break; /* nobody asks for what comes after the last keys and values */
        if (model->kv_kind == F32) read_all(model, layer, F32, F32, prompt);
        else if (kind == F32) read_all(model, layer, BF16, F32, prompt);
        else read_all(model, layer, BF16, BF16, prompt);
        product(model, &layer->out, ADD, rows, prompt->input, prompt->x, model->hidden);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) normalise(model, layer->mlp_norm, prompt->x, kind, prompt->input, row);
        product(model, &layer->gate_up, GATE, rows, prompt->input, prompt->mlp, model->intermediate);
        product(model, &layer->down, ADD, rows, prompt->mlp, prompt->x, model->hidden);
    }
}
