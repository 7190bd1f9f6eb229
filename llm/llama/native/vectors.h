/* As many numbers at a time as a register holds, with GCC's vector extensions: AVX-512, AVX2, NEON.

   Sizes come from `kernel.py`:
   LANES         outputs in a panel of weights, and tokens in a block of keys and values: 16
   GROUP         inputs that share a scale in quantised weights
   SPAN          keys that one piece of attention covers
   MAX_HEAD_DIM  dimensions of a head, at most
   TOKENS        of a prompt, that are worked on at once
   MAX_ROWS      of a step, or of a product in float32, at most: threads keep sums of their inputs on their stacks */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Numbers in a register; sums that are kept in registers at a time. GCC keeps vectors that are wider than a register in
   memory, which made a step of eight rows 13 times as slow with AVX2. WIDTH divides LANES. */
#ifdef __AVX512F__
#define WIDTH 16
#define MOST_SUMS 16
#elif defined(__AVX__)
#define WIDTH 8
#define MOST_SUMS 8
#else
#define WIDTH 4
#define MOST_SUMS 16
#endif

typedef float f32 __attribute__((vector_size(4 * WIDTH)));
typedef int32_t i32 __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t u32 __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t u16 __attribute__((vector_size(2 * WIDTH)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

enum kind { F32, BF16, INT8, INT4 };

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
    float sums[WIDTH];
    memcpy(sums, &v, sizeof v);
    for (int width = WIDTH / 2; width; width /= 2)
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
