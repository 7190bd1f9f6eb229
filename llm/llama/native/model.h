/* A model, and what a step and a prompt have in common. */

#pragma once

#include "products.h"

#define EXPORT __attribute__((visibility("default")))

typedef struct {
    const float *attention_norm, *mlp_norm;
    Linear qkv, out, gate_up, down; /* of gate_up, panels of gate and up take turns */
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

/* y = x over its root mean square, times weight. */
INLINE void normalise(const Model *model, const float *weight, const float *x, int kind, void *y, int64_t row) {
    const int64_t hidden = model->hidden;
    const float *from = x + row * hidden;
    f32 squares = {};
    for (int64_t i = 0; i < hidden; i += WIDTH) squares += load(from + i) * load(from + i);
    const float scale = 1 / sqrtf(add_up(squares) / hidden + model->epsilon);
    for (int64_t i = 0; i < hidden; i += WIDTH)
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
INLINE void place(const Model *model, const Layer *layer, const int32_t *table, int64_t position, int64_t kv_head,
                  const float *heads) {
    const int64_t size = model->head_dim, slot = position % LANES;
    const float *value = heads + (model->heads + model->kv_heads + kv_head) * size;
    float key[MAX_HEAD_DIM];
    turn(model, position, 1, heads + (model->heads + kv_head) * size, key);
    const int64_t at = (table[position / LANES] * model->kv_heads + kv_head) * size * LANES;
    if (model->kv_kind == BF16) {
        for (int64_t i = 0; i < size; i += WIDTH) {
            const u16 narrow_key = to_bf16(load(key + i)), narrow_value = to_bf16(load(value + i));
            for (int64_t j = 0; j < WIDTH; j++) ((uint16_t *)layer->keys)[at + (i + j) * LANES + slot] = narrow_key[j];
            memcpy((uint16_t *)layer->values + at + slot * size + i, &narrow_value, sizeof narrow_value);
        }
    } else {
        for (int64_t i = 0; i < size; i++) ((float *)layer->keys)[at + i * LANES + slot] = key[i];
        memcpy((float *)layer->values + at + slot * size, value, size * sizeof(float));
    }
}
