/* A decode step for any number of sequences: embeddings in, logits out.

   Weights are read once and unpacked in registers; everything is computed in float32. What a sequence gets does not
   depend on how many others are in the step. */

#include "model.h"

#include <omp.h>

/* Rows that are in a step, and room to work in. What is small every thread computes for itself, in room of its own:
   that takes less time than waiting for the others. */
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

/* Values of `VECTORS` vectors of dimensions from `i` on, weighted and added up. */
#define WEIGH(GROUPED, VECTORS)                                                                                        \
    {                                                                                                                  \
        f32 mixed[GROUPED][VECTORS] = {};                                                                              \
        for (int64_t t = 0; t < length; t++) {                                                                         \
            const int64_t at =                                                                                         \
                ((table[(first + t) / LANES] * model->kv_heads + kv_head) * LANES + t % LANES) * size + i;             \
            UNROLL for (int j = 0; j < VECTORS; j++) {                                                                 \
                const f32 value = load_kind(kind, layer->values, at + j * WIDTH);                                      \
                UNROLL for (int g = 0; g < GROUPED; g++) mixed[g][j] += value * scores[g][t];                          \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int g = 0; g < GROUPED; g++)                                                                       \
            UNROLL for (int j = 0; j < VECTORS; j++) store(out + g * out_stride + i + j * WIDTH, mixed[g][j]);         \
    }

/* Queries of `GROUPED` heads, which share a key-value head, over the keys `first` to `end` of a row. Several vectors
   of keys or values are taken at a time: sums that do not wait for one another. */
#define ATTEND(GROUPED)                                                                                                \
    INLINE void attend_##GROUPED(const Model *model, const Layer *layer, int kind, const int32_t *table,               \
                                 int64_t kv_head, const float *queries, int64_t first, int64_t end, float *out,        \
                                 int64_t out_stride) {                                                                 \
        enum { VECTORS = WIDTH == LANES ? 4 : MOST_SUMS / (GROUPED > 2 ? 4 : GROUPED) };                               \
        const int64_t size = model->head_dim, length = end - first;                                                    \
        float scores[GROUPED][SPAN] __attribute__((aligned(64)));                                                      \
        f32 highest[GROUPED];                                                                                          \
        UNROLL for (int g = 0; g < GROUPED; g++) highest[g] = (f32){} - INFINITY;                                      \
        for (int64_t t = 0; t < length; t += VECTORS * WIDTH) {                                                        \
            int64_t at[VECTORS], soon[VECTORS];                                                                        \
            UNROLL for (int j = 0; j < VECTORS; j++) {                                                                 \
                const int64_t key = t + j * WIDTH < length ? t + j * WIDTH : t; /* padding, masked below */            \
                at[j] = (table[(first + key) / LANES] * model->kv_heads + kv_head) * size * LANES + key % LANES;       \
                const int64_t later = key + VECTORS * WIDTH < length ? key + VECTORS * WIDTH : key;                    \
                soon[j] = (table[(first + later) / LANES] * model->kv_heads + kv_head) * size * LANES + later % LANES; \
            }                                                                                                          \
            f32 score[VECTORS][GROUPED] = {};                                                                          \
            for (int64_t i = 0; i < size; i++)                                                                         \
                UNROLL for (int j = 0; j < VECTORS; j++) {                                                             \
                    fetch(kind, layer->values, at[j] + i * LANES);                                                     \
                    fetch(kind, layer->keys, soon[j] + i * LANES);                                                     \
                    const f32 key = load_kind(kind, layer->keys, at[j] + i * LANES);                                   \
                    UNROLL for (int g = 0; g < GROUPED; g++) score[j][g] += key * queries[g * size + i];               \
                }                                                                                                      \
            UNROLL for (int j = 0; j < VECTORS; j++)                                                                   \
                UNROLL for (int g = 0; g < GROUPED; g++) {                                                             \
                    float masked[WIDTH];                                                                               \
                    store(masked, score[j][g]);                                                                        \
                    for (int64_t i = length - t - j * WIDTH; i < WIDTH; i++) masked[i < 0 ? 0 : i] = -INFINITY;        \
                    const f32 kept = length - t - j * WIDTH < WIDTH ? load(masked) : score[j][g];                      \
                    store(scores[g] + t + j * WIDTH, kept);                                                            \
                    highest[g] = greater(highest[g], kept);                                                            \
                }                                                                                                      \
        }                                                                                                              \
        UNROLL for (int g = 0; g < GROUPED; g++) {                                                                     \
            float most = highest[g][0];                                                                                \
            for (int i = 1; i < WIDTH; i++) most = highest[g][i] > most ? highest[g][i] : most;                        \
            f32 sum = {};                                                                                              \
            for (int64_t t = 0; t < length; t += WIDTH) {                                                              \
                const f32 weight = power_of_e(load(scores[g] + t) - most);                                             \
                store(scores[g] + t, weight);                                                                          \
                sum += weight;                                                                                         \
            }                                                                                                          \
            out[g * out_stride + size] = most;                                                                         \
            out[g * out_stride + size + 1] = add_up(sum);                                                              \
        }                                                                                                              \
        if (size % (VECTORS * WIDTH) == 0)                                                                             \
            for (int64_t i = 0; i < size; i += VECTORS * WIDTH)                                                        \
                WEIGH(GROUPED, VECTORS)                                                                                \
        else                                                                                                           \
            for (int64_t i = 0; i < size; i += WIDTH)                                                                  \
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

EXPORT void decode(const Model *model, const Step *step) {
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
