/* A piece of a prompt: embeddings in, keys and values into their blocks.

   What a token gets does not depend on how its prompt was cut. */

#include "model.h"

#include <omp.h>

/* Tokens of one sequence, which follow one another, and room to work in. */
typedef struct {
    int64_t threads, rows, start; /* how many, and the position of the first */
    const int32_t *table;         /* where the sequence's keys and values are */
    float *x;                     /* [row][hidden]: embeddings in */
    float *qkv;                   /* [row][(heads + 2 * kv_heads) * head_dim] */
    void *input, *mlp; /* what is multiplied, float32 or bfloat16, rows filled up to a multiple of TOKENS:
                          [row][hidden] or [row][heads * head_dim]; [row][intermediate] */
    uint32_t *panels;  /* [thread][widest input][LANES]: weights, unpacked */
} Prompt;

#define VECTORS_AT_ONCE (MOST_SUMS < 16 ? 1 : 2) /* of keys or values, times TOKENS sums */

/* `VECTORS` vectors of values from dimension `i` on, weighted and added to `out` [token][head_dim]. */
#define WEIGH_TILE(VECTORS)                                                                                            \
    {                                                                                                                  \
        f32 mixed[TOKENS][VECTORS];                                                                                    \
        UNROLL for (int r = 0; r < TOKENS; r++)                                                                        \
            UNROLL for (int j = 0; j < VECTORS; j++) mixed[r][j] = load(out[r] + i + j * WIDTH) * fade[r];             \
        for (int64_t t = 0; t < length; t++) {                                                                         \
            const int64_t block = table[(span + t) / LANES] * model->kv_heads + kv_head;                               \
            UNROLL for (int j = 0; j < VECTORS; j++) {                                                                 \
                const f32 value = load_kind(kind, layer->values, (block * LANES + t % LANES) * size + i + j * WIDTH);  \
                UNROLL for (int r = 0; r < TOKENS; r++) mixed[r][j] += value * scores[r][t];                           \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int r = 0; r < TOKENS; r++)                                                                        \
            UNROLL for (int j = 0; j < VECTORS; j++) store(out[r] + i + j * WIDTH, mixed[r][j]);                       \
    }

/* One head of up to TOKENS tokens, over all keys up to themselves. A span of keys at a time: what was weighted before
   fades when a higher score comes (Milakov & Gimelshein 2018, arXiv:1805.02867). */
INLINE void read_tile(const Model *model, const Layer *layer, int kind, const Prompt *prompt, int64_t row,
                      int64_t head) {
    const int64_t size = model->head_dim, stride = (model->heads + 2 * model->kv_heads) * size;
    const int64_t kv_head = head / (model->heads / model->kv_heads), start = prompt->start + row;
    const int64_t rows = prompt->rows - row < TOKENS ? prompt->rows - row : TOKENS, end = start + rows;
    const int32_t *table = prompt->table;
    float queries[TOKENS][MAX_HEAD_DIM] = {}, out[TOKENS][MAX_HEAD_DIM] = {};
    float scores[TOKENS][SPAN + LANES] __attribute__((aligned(64))); /* not at distances that share a place in caches */
    float highest[TOKENS], sums[TOKENS] = {}, fade[TOKENS];
    i32 lanes;
    for (int i = 0; i < WIDTH; i++) lanes[i] = i;
    for (int r = 0; r < TOKENS; r++) highest[r] = -INFINITY;
    for (int r = 0; r < rows; r++)
        turn(model, start + r, 1 / sqrtf(size), prompt->qkv + (row + r) * stride + head * size, queries[r]);
    for (int64_t span = 0; span < end; span += SPAN) {
        const int64_t length = end - span < SPAN ? end - span : SPAN;
        /* Scores; -infinity for keys that come after a token. */
        const int64_t padded = (length + LANES - 1) / LANES * LANES;
        for (int64_t t = 0; t < padded; t += VECTORS_AT_ONCE * WIDTH) {
            int64_t at[VECTORS_AT_ONCE];
            UNROLL for (int j = 0; j < VECTORS_AT_ONCE; j++) {
                const int64_t key = t + j * WIDTH < padded ? t + j * WIDTH : t; /* padding, masked below */
                at[j] = (table[(span + key) / LANES] * model->kv_heads + kv_head) * size * LANES + key % LANES;
            }
            f32 score[VECTORS_AT_ONCE][TOKENS] = {};
            for (int64_t i = 0; i < size; i++) {
                f32 key[VECTORS_AT_ONCE];
                UNROLL for (int j = 0; j < VECTORS_AT_ONCE; j++)
                    key[j] = load_kind(kind, layer->keys, at[j] + i * LANES);
                UNROLL for (int r = 0; r < TOKENS; r++)
                    UNROLL for (int j = 0; j < VECTORS_AT_ONCE; j++) score[j][r] += key[j] * queries[r][i];
            }
            UNROLL for (int j = 0; j < VECTORS_AT_ONCE; j++)
                UNROLL for (int r = 0; r < TOKENS; r++) {
                    const i32 is_known = lanes + (int)(span + t + j * WIDTH - start) <= r;
                    const f32 none = (f32){} - INFINITY;
                    store(scores[r] + t + j * WIDTH, (f32)(((i32)score[j][r] & is_known) | ((i32)none & ~is_known)));
                }
        }
        /* Weights, by the highest score so far. */
        for (int r = 0; r < TOKENS; r++) {
            f32 greatest = (f32){} - INFINITY, sum = {};
            for (int64_t t = 0; t < length; t += WIDTH) greatest = greater(greatest, load(scores[r] + t));
            float most = highest[r];
            for (int i = 0; i < WIDTH; i++) most = greatest[i] > most ? greatest[i] : most;
            for (int64_t t = 0; t < length; t += WIDTH) {
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
        /* Values. */
        if (size % (VECTORS_AT_ONCE * WIDTH) == 0)
            for (int64_t i = 0; i < size; i += VECTORS_AT_ONCE * WIDTH)
                WEIGH_TILE(VECTORS_AT_ONCE)
        else
            for (int64_t i = 0; i < size; i += WIDTH)
                WEIGH_TILE(1)
    }
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < size; i += WIDTH)
            store_kind(kind_of_inputs(model->kv_kind), prompt->input, ((row + r) * model->heads + head) * size + i,
                       load(out[r] + i) / sums[r]);
}

/* All heads and tokens, shared by the threads of a team. */
INLINE void read_all(const Model *model, const Layer *layer, int kind, const Prompt *prompt) {
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (int64_t row = 0; row < prompt->rows; row += TOKENS)
        for (int64_t head = 0; head < model->heads; head++)
            read_tile(model, layer, kind, prompt, row, head);
}

/* Compute keys and values, and put them into their blocks. */
EXPORT void prefill(const Model *model, const Prompt *prompt) {
    const int64_t rows = prompt->rows, qkv = (model->heads + 2 * model->kv_heads) * model->head_dim;
    const int64_t heads = model->heads * model->head_dim;
    const int64_t wider = heads > model->hidden ? heads : model->hidden;
    const int64_t widest = wider > model->intermediate ? wider : model->intermediate;
    const int kind = kind_of_inputs(model->kv_kind);
#pragma omp parallel num_threads(prompt->threads)
    for (int64_t i = 0; i < model->num_layers; i++) {
        const Layer *layer = model->layers + i;
        uint32_t *panels = prompt->panels + omp_get_thread_num() * widest * LANES;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            normalise(model, layer->attention_norm, prompt->x, kind, prompt->input, row);
        multiply_prompt(&layer->qkv, SET, kind, rows, prompt->input, prompt->qkv, qkv, panels);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t kv_head = 0; kv_head < model->kv_heads; kv_head++)
                place(model, layer, prompt->table, prompt->start + row, kv_head, prompt->qkv + row * qkv);
        if (i == model->num_layers - 1) break; /* nobody asks for what comes after the last keys and values */
        if (model->kv_kind == BF16)
            read_all(model, layer, BF16, prompt);
        else
            read_all(model, layer, F32, prompt);
        multiply_prompt(&layer->out, ADD, kind, rows, prompt->input, prompt->x, model->hidden, panels);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            normalise(model, layer->mlp_norm, prompt->x, kind, prompt->input, row);
        multiply_prompt(&layer->gate_up, GATE, kind, rows, prompt->input, prompt->mlp, model->intermediate, panels);
        multiply_prompt(&layer->down, ADD, kind, rows, prompt->mlp, prompt->x, model->hidden, panels);
    }
}
