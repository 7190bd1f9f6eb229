/* Runs the kernel on random models and sequences, and compares it with a naive forward in double precision.

   Every buffer has exactly the size that `kernel.py` gives it, and lies either on the heap, where AddressSanitizer
   watches its ends, or against a page that cannot be accessed, at its end or at its beginning.

       fuzz run SEED COUNT

   prints a line and returns 0 if all COUNT models were computed right. The sizes are written down here once more; that
   `kernel.py` itself has them right shows when its tests run over a sanitized kernel.

   Compiled as one unit with the kernel, whose structs and constants it takes from there. */

#define _GNU_SOURCE
#include "step.c"
#include "prompt.c"
#include "products.c"

#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define REFERENCE static __attribute__((no_sanitize("address", "undefined"), noinline))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* ---- random numbers ---- */

static uint64_t state;

static uint64_t next(void) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545F4914F6CDD1DULL;
}

static int64_t between(int64_t least, int64_t most) {
    return least + (int64_t)((next() >> 16) % (uint64_t)(most - least + 1));
}

static int one_in(int64_t n) { return between(1, n) == 1; }

static double uniform(double low, double high) { return low + (high - low) * ((double)(next() >> 11) * 0x1p-53); }

/* ---- memory: all of it is released after each model ---- */

enum where { HEAP, PAGE_AFTER, PAGE_BEFORE };

typedef struct {
    void *start;
    size_t mapped; /* 0: from malloc */
} Taken;

static Taken taken[4096];
static int num_taken;
static enum where where_taken;

static void *take(int64_t bytes) {
    void *found;
    size_t mapped = 0;
    if (num_taken == 4096 || bytes <= 0) abort();
    if (where_taken == HEAP) {
        found = malloc(bytes);
        if (!found) abort();
        taken[num_taken++] = (Taken){found, 0};
    } else {
        const size_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
        mapped = inside + 2 * page;
        char *start = mmap(NULL, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start == MAP_FAILED || mprotect(start + page, inside, PROT_READ | PROT_WRITE)) abort();
        taken[num_taken++] = (Taken){start, mapped};
        found = where_taken == PAGE_AFTER ? start + page + inside - bytes : start + page;
    }
    memset(found, 0xff, bytes); /* NaN in every float format */
    return found;
}

static float *take_floats(int64_t count) { return take(count * 4); }

static void release(int down_to) {
    while (num_taken > down_to) {
        const Taken last = taken[--num_taken];
        if (last.mapped) munmap(last.start, last.mapped);
        else free(last.start);
    }
}

/* ---- sizes, as kernel.py has them ---- */

typedef struct {
    int64_t normed, qkv, partial, mixed, mlp;
} StepSizes;

typedef struct {
    int64_t qkv, input, mlp, panels;
} PromptSizes;

static int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static StepSizes step_sizes(const Model *m, int64_t threads, int64_t rows, int64_t max_blocks) {
    const int64_t mixed = m->heads * m->head_dim, spans = up_to(max_blocks * LANES, SPAN) / SPAN;
    return (StepSizes){rows * threads * m->hidden, rows * (mixed + 2 * m->kv_heads * m->head_dim),
                       rows * m->heads * spans * (m->head_dim + 2), rows * threads * mixed, rows * m->intermediate};
}

static PromptSizes prompt_sizes(const Model *m, int64_t threads, int64_t rows) {
    const int64_t mixed = m->heads * m->head_dim, widest = MAX(m->hidden, mixed), filled_up = up_to(rows, TOKENS);
    return (PromptSizes){rows * (mixed + 2 * m->kv_heads * m->head_dim), filled_up * widest,
                         filled_up * m->intermediate, threads * LANES * MAX(widest, m->intermediate)};
}

/* ---- number formats, without the kernel's own conversions ---- */

static double value_of_f16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double size = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return bits & 0x8000 ? -size : size;
}

static uint16_t to_f16(double value) {
    int exponent;
    const double size = fabs(value);
    if (size == 0) return 0;
    frexp(size, &exponent);
    const int step = MAX(exponent - 11, -24); /* 11 bits, fewer near zero */
    const long scaled = lround(ldexp(size, -step));
    const uint16_t bits = step == -24 ? scaled : scaled + ((step + 24) << 10);
    return bits | (value < 0 ? 0x8000 : 0);
}

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static float rounded_to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    return from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

/* ---- a random model ---- */

typedef struct {
    Linear packed;
    float *matrix; /* [outputs][inputs] */
    float *bias;   /* [outputs] */
} Matrix;

typedef struct {
    Matrix qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm;
} Weights;

static Matrix random_matrix(int kind, int64_t outputs, int64_t inputs, int is_gated, int has_bias) {
    const int64_t panels = up_to(outputs, 2 * LANES) / LANES, in_word = per_word(kind), groups = inputs / GROUP;
    const int64_t per_group = kind == INT4 ? 2 : 1;
    const double most = sqrt(3.0 / inputs);
    uint32_t *words = take(panels * (inputs / in_word) * LANES * 4);
    uint16_t *scales = kind == INT8 || kind == INT4 ? take(panels * groups * per_group * LANES * 2) : NULL;
    float *biases = has_bias ? take_floats(panels * LANES) : NULL;
    Matrix made = {{words, scales, biases, outputs, inputs, kind}, take_floats(outputs * inputs), take_floats(outputs)};
    memset(words, 0, panels * (inputs / in_word) * LANES * 4);
    if (scales) memset(scales, 0, panels * groups * per_group * LANES * 2);
    if (biases) memset(biases, 0, panels * LANES * 4);
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t lane = 0; lane < LANES; lane++) {
            const int64_t half = panel % 2 ? outputs / 2 : 0;
            const int64_t output = is_gated ? half + panel / 2 * LANES + lane : panel * LANES + lane;
            if (output >= outputs) continue; /* padding */
            made.bias[output] = has_bias ? uniform(-0.5, 0.5) : 0;
            if (has_bias) biases[panel * LANES + lane] = made.bias[output];
            for (int64_t input = 0; input < inputs; input++) {
                const int64_t group = panel * groups + input / GROUP;
                uint16_t *scale = scales ? scales + group * per_group * LANES + lane : NULL;
                uint32_t *word = words + (panel * (inputs / in_word) + input / in_word) * LANES + lane;
                const int shift = input % in_word * (32 / in_word);
                float *weight = made.matrix + output * inputs + input;
                if (scale && input % GROUP == 0) {
                    const double size = one_in(20) ? 0x1p-24 * between(0, 1023) : most * uniform(0.5, 1);
                    *scale = to_f16(size / (kind == INT8 ? 127 : 7.5));
                    if (kind == INT4) scale[LANES] = to_f16(-size * uniform(0.5, 1));
                }
                if (kind == F32) {
                    *weight = uniform(-most, most);
                    *word = bits_of(*weight);
                } else if (kind == BF16) {
                    *weight = rounded_to_bf16(uniform(-most, most));
                    *word |= bits_of(*weight) >> 16 << shift;
                } else if (kind == INT8) {
                    const int q = between(-127, 127);
                    *weight = value_of_f16(*scale) * q;
                    *word |= (uint32_t)(q & 255) << shift;
                } else {
                    const uint32_t q = between(0, 15);
                    *weight = value_of_f16(*scale) * q + value_of_f16(scale[LANES]);
                    *word |= q << shift;
                }
            }
        }
    return made;
}

static const float *random_norm(int64_t size) {
    float *made = take_floats(size);
    for (int64_t i = 0; i < size; i++) made[i] = uniform(0.7, 1.3);
    return made;
}

/* ---- the naive forward ---- */

/* Every product that is added up is changed by up to this part of it, as by rounding. 0: none is. */
static double inaccuracy;

REFERENCE double inexact(double value) { return inaccuracy ? value * (1 + inaccuracy * uniform(-1, 1)) : value; }

REFERENCE void product(const Matrix *w, const double *x, double *y) {
    for (int64_t o = 0; o < w->packed.outputs; o++) {
        double sum = w->bias[o];
        for (int64_t i = 0; i < w->packed.inputs; i++) sum += inexact(w->matrix[o * w->packed.inputs + i] * x[i]);
        y[o] = sum;
    }
}

REFERENCE void norm_of(const Model *m, const float *weight, const double *x, double *y) {
    double squares = 0;
    for (int64_t i = 0; i < m->hidden; i++) squares += x[i] * x[i];
    const double scale = 1 / sqrt(squares / m->hidden + m->epsilon);
    for (int64_t i = 0; i < m->hidden; i++) y[i] = inexact(x[i] * scale * weight[i]);
}

REFERENCE void rotate(const Model *m, int64_t position, double *head) {
    const int64_t half = m->head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const double a = head[i], b = head[i + half];
        const double c = m->cosines[position * half + i], s = m->sines[position * half + i];
        head[i] = inexact(a * c - b * s), head[i + half] = inexact(b * c + a * s);
    }
}

/* keys, values: [layer][token][kv_heads * head_dim]; logits: [token][vocabulary], of the last `num_logits` tokens. */
REFERENCE void forward(const Model *m, const Weights *layers, const Matrix *head, const float *embeddings,
                       int64_t tokens, int64_t num_logits, double *keys, double *values, double *logits) {
    const int64_t size = m->head_dim, wide = m->heads * size, narrow = m->kv_heads * size;
    double *x = malloc(tokens * m->hidden * 8), *normed = malloc(m->hidden * 8), *qkv = malloc((wide + 2 * narrow) * 8);
    double *mixed = malloc(wide * 8), *gate_up = malloc(2 * m->intermediate * 8), *added = malloc(m->hidden * 8);
    double *scores = malloc(tokens * 8);
    if (!x || !normed || !qkv || !mixed || !gate_up || !added || !scores) abort();
    for (int64_t i = 0; i < tokens * m->hidden; i++) x[i] = embeddings[i];
    for (int64_t l = 0; l < m->num_layers; l++) {
        double *layer_keys = keys + l * tokens * narrow, *layer_values = values + l * tokens * narrow;
        for (int64_t t = 0; t < tokens; t++) {
            double *row = x + t * m->hidden;
            norm_of(m, layers[l].attention_norm, row, normed);
            product(&layers[l].qkv, normed, qkv);
            for (int64_t h = 0; h < m->heads + m->kv_heads; h++) rotate(m, t, qkv + h * size);
            for (int64_t i = 0; i < narrow; i++) {
                const double key = qkv[wide + i], value = qkv[wide + narrow + i];
                layer_keys[t * narrow + i] = m->kv_kind == BF16 ? rounded_to_bf16(key) : key;
                layer_values[t * narrow + i] = m->kv_kind == BF16 ? rounded_to_bf16(value) : value;
            }
            for (int64_t h = 0; h < m->heads; h++) {
                const int64_t at = h / (m->heads / m->kv_heads) * size;
                double most = -INFINITY, sum = 0;
                for (int64_t s = 0; s <= t; s++) {
                    double score = 0;
                    const double *query = qkv + h * size, *key = layer_keys + s * narrow + at;
                    for (int64_t i = 0; i < size; i++) score += inexact(query[i] * key[i]);
                    scores[s] = score / sqrt(size);
                    most = MAX(most, scores[s]);
                }
                for (int64_t i = 0; i < size; i++) mixed[h * size + i] = 0;
                for (int64_t s = 0; s <= t; s++) {
                    const double weight = exp(scores[s] - most);
                    sum += weight;
                    const double *value = layer_values + s * narrow + at;
                    for (int64_t i = 0; i < size; i++) mixed[h * size + i] += weight * value[i];
                }
                for (int64_t i = 0; i < size; i++) mixed[h * size + i] = inexact(mixed[h * size + i] / sum);
            }
            product(&layers[l].out, mixed, added);
            for (int64_t i = 0; i < m->hidden; i++) row[i] = inexact(row[i] + added[i]);
            norm_of(m, layers[l].mlp_norm, row, normed);
            product(&layers[l].gate_up, normed, gate_up);
            for (int64_t i = 0; i < m->intermediate; i++)
                gate_up[i] = inexact(gate_up[i] / (1 + exp(-gate_up[i])) * gate_up[m->intermediate + i]);
            product(&layers[l].down, gate_up, added);
            for (int64_t i = 0; i < m->hidden; i++) row[i] = inexact(row[i] + added[i]);
        }
    }
    for (int64_t t = 0; t < num_logits; t++) {
        norm_of(m, m->norm, x + (tokens - num_logits + t) * m->hidden, normed);
        product(head, normed, logits + t * head->packed.outputs);
    }
    free(x), free(normed), free(qkv), free(mixed), free(gate_up), free(added), free(scores);
}

/* ---- a model and its sequences ---- */

typedef struct {
    int64_t prompt, tokens; /* how many are read as a prompt, and all */
    int32_t *blocks;
    float *embeddings;
    double *keys, *values, *logits;
    double tolerance; /* relative to the largest number of its kind and layer */
} Sequence;

static int64_t num_wrong;
static double furthest;

REFERENCE void compare(const char *what, int64_t number, double got, double expected, double most, double tolerance) {
    const double distance = fabs(got - expected) / (most + 1e-9);
    if (distance > furthest) furthest = distance;
    if (distance <= tolerance) return; /* NaN is not */
    if (num_wrong++ < 10) fprintf(stderr, "%s %lld: expected %g, got %g\n", what, (long long)number, expected, got);
}

static double most_of(const double *numbers, int64_t count) {
    double most = 0;
    for (int64_t i = 0; i < count; i++) most = MAX(most, fabs(numbers[i]));
    return most;
}

static double largest_change(const double *changed, const double *numbers, int64_t count) {
    double most = 0;
    for (int64_t i = 0; i < count; i++) most = MAX(most, fabs(changed[i] - numbers[i]));
    return most / (most_of(numbers, count) + 1e-9);
}

/* The relative error that rounding to float32 may cause in this sequence. Some sequences are ill-conditioned: sums
   cancel, the norm after them scales up what is left, and an error in the seventh digit becomes one in the fourth. So
   the amplification is measured, by changing the products of the reference as rounding would. */
static double float32_tolerance(const Model *m, const Weights *layers, const Matrix *head, const Sequence *sequence,
                                int64_t num_logits) {
    const int64_t per_layer = sequence->tokens * m->kv_heads * m->head_dim, num_stored = m->num_layers * per_layer;
    const int64_t in_logits = num_logits * head->packed.outputs;
    double *keys = malloc(num_stored * 8), *values = malloc(num_stored * 8), *logits = malloc(in_logits * 8), most = 0;
    if (!keys || !values || !logits) abort();
    const uint64_t before = state;
    inaccuracy = FLT_EPSILON;
    for (int sample = 0; sample < 3; sample++) {
        forward(m, layers, head, sequence->embeddings, sequence->tokens, num_logits, keys, values, logits);
        for (int64_t l = 0; l < m->num_layers; l++) {
            most = MAX(most, largest_change(keys + l * per_layer, sequence->keys + l * per_layer, per_layer));
            most = MAX(most, largest_change(values + l * per_layer, sequence->values + l * per_layer, per_layer));
        }
        most = MAX(most, largest_change(logits, sequence->logits, in_logits));
    }
    inaccuracy = 0;
    state = before; /* the seed's model is the same with and without this */
    free(keys), free(values), free(logits);
    return 1e-5 + 40 * most; /* in 900 models, the kernel's error was at most 12 times `most` (AVX2, no sanitizers) */
}

static void prefill_in_chunks(const Model *m, Sequence *sequence) {
    for (int64_t start = 0; start < sequence->prompt;) {
        const int before = num_taken;
        const int64_t left = sequence->prompt - start, rows = one_in(3) ? left : between(1, left);
        const int64_t threads = between(1, 4), num_blocks = up_to(start + rows, LANES) / LANES;
        const PromptSizes sizes = prompt_sizes(m, threads, rows);
        int32_t *table = take(num_blocks * 4);
        float *x = take_floats(rows * m->hidden);
        memcpy(table, sequence->blocks, num_blocks * 4);
        memcpy(x, sequence->embeddings + start * m->hidden, rows * m->hidden * 4);
        const Prompt prompt = {threads, rows, start, table, x, take_floats(sizes.qkv), take_floats(sizes.input),
                               take_floats(sizes.mlp), take(sizes.panels * 4)};
        prefill(m, &prompt);
        release(before);
        start += rows;
    }
}

static void decode_all(const Model *m, const Sequence *sequences, int64_t count, int64_t number) {
    const int before = num_taken;
    const int64_t threads = between(1, 4), vocabulary = m->head.outputs;
    int32_t *positions = take(count * 4);
    int64_t last = 0;
    for (int64_t row = 0; row < count; row++) {
        positions[row] = sequences[row].prompt + number;
        last = MAX(last, positions[row]);
    }
    const int64_t max_blocks = last / LANES + 1;
    int32_t *tables = take(count * max_blocks * 4);
    float *x = take_floats(count * m->hidden), *logits = take_floats(count * vocabulary);
    memset(tables, 0, count * max_blocks * 4);
    for (int64_t row = 0; row < count; row++) {
        const int64_t own = up_to(sequences[row].tokens, LANES) / LANES;
        memcpy(tables + row * max_blocks, sequences[row].blocks, (own < max_blocks ? own : max_blocks) * 4);
        memcpy(x + row * m->hidden, sequences[row].embeddings + positions[row] * m->hidden, m->hidden * 4);
    }
    const StepSizes sizes = step_sizes(m, threads, count, max_blocks);
    const Step step = {threads, count, positions, tables, max_blocks, x, take_floats(sizes.normed),
                       take_floats(sizes.qkv), take_floats(sizes.partial), take_floats(sizes.mixed),
                       take_floats(sizes.mlp), logits};
    decode(m, &step);
    for (int64_t row = 0; row < count; row++) {
        const double *expected = sequences[row].logits + number * vocabulary;
        const double most = most_of(expected, vocabulary);
        for (int64_t i = 0; i < vocabulary; i++)
            compare("logit", i, logits[row * vocabulary + i], expected[i], most, sequences[row].tolerance);
    }
    release(before);
}

static double stored(const Model *m, const void *memory, int64_t at) {
    return m->kv_kind == BF16 ? from_bits((uint32_t)((const uint16_t *)memory)[at] << 16) : ((const float *)memory)[at];
}

static int is_untouched(const Model *m, const void *memory, int64_t at) {
    return m->kv_kind == BF16 ? ((const uint16_t *)memory)[at] == 0xffff : ((const uint32_t *)memory)[at] == 0xffffffff;
}

/* Keys and values are where they belong, and nothing else was written. */
static void compare_memory(const Model *m, const Sequence *sequences, int64_t count, int64_t num_blocks) {
    const int64_t size = m->head_dim, narrow = m->kv_heads * size;
    int64_t num_tokens = 0, num_touched = 0;
    for (int64_t s = 0; s < count; s++) num_tokens += sequences[s].tokens;
    for (int64_t l = 0; l < m->num_layers; l++) {
        const Layer *layer = m->layers + l;
        for (int64_t s = 0; s < count; s++) {
            const Sequence *sequence = sequences + s;
            const double *keys = sequence->keys + l * sequence->tokens * narrow;
            const double *values = sequence->values + l * sequence->tokens * narrow;
            const double most_key = most_of(keys, sequence->tokens * narrow);
            const double most_value = most_of(values, sequence->tokens * narrow);
            for (int64_t t = 0; t < sequence->tokens; t++)
                for (int64_t h = 0; h < m->kv_heads; h++) {
                    const int64_t block = sequence->blocks[t / LANES] * m->kv_heads + h, slot = t % LANES;
                    for (int64_t i = 0; i < size; i++) {
                        compare("key", t, stored(m, layer->keys, (block * size + i) * LANES + slot),
                                keys[t * narrow + h * size + i], most_key, sequence->tolerance);
                        compare("value", t, stored(m, layer->values, (block * LANES + slot) * size + i),
                                values[t * narrow + h * size + i], most_value, sequence->tolerance);
                    }
                }
        }
        for (int64_t at = 0; at < num_blocks * narrow * LANES; at++)
            num_touched += !is_untouched(m, layer->keys, at) + !is_untouched(m, layer->values, at);
    }
    if (num_touched != m->num_layers * num_tokens * 2 * narrow && num_wrong++ < 10)
        fprintf(stderr, "keys and values: %lld numbers were written, expected %lld\n", (long long)num_touched,
                (long long)(m->num_layers * num_tokens * 2 * narrow));
}

static void run_model(uint64_t seed) {
    state = seed * 0x9E3779B97F4A7C15ULL + 1;
    for (int i = 0; i < 8; i++) next();
    where_taken = (enum where)(seed % 3);
    static const int head_dims[] = {16, 16, 32, 32, 48, 64, 64, 80, 96, 112, 128, 160, 192, 240, 256};
    Model m = {.num_layers = between(1, 3), .hidden = GROUP * between(1, 5), .intermediate = GROUP * between(1, 7)};
    do {
        m.kv_heads = between(1, 4), m.heads = m.kv_heads * between(1, 9);
        m.head_dim = head_dims[between(0, sizeof head_dims / sizeof *head_dims - 1)];
    } while (m.heads * m.head_dim % GROUP || m.heads * m.head_dim > 512);
    m.epsilon = 1e-5f;
    const int kind = between(F32, INT4), is_plain = kind == F32 || kind == BF16;
    m.kv_kind = is_plain ? kind : between(F32, BF16);
    const int64_t mixed = m.heads * m.head_dim, narrow = m.kv_heads * m.head_dim, vocabulary = between(1, 150);
    const int is_small = mixed <= 64 && m.hidden <= 96 && m.num_layers <= 2;

    /* Sequences: mostly a few short ones; sometimes as many as a step takes; sometimes long ones, of several spans. */
    const int64_t count = one_in(6) ? between(MAX_ROWS / 2, MAX_ROWS) : between(1, 9), num_steps = between(1, 2);
    const int64_t longest = count > 9 ? 20 : is_small && one_in(3) ? 2 * SPAN + 40 : one_in(3) ? 150 : 40;
    Sequence *sequences = calloc(count, sizeof *sequences);
    if (!sequences) abort();
    int64_t num_blocks = 0, context = 0;
    for (int64_t s = 0; s < count; s++) {
        const int64_t limit = longest > 150 && s > 1 ? 60 : longest;
        sequences[s].prompt = longest > 150 && s == 0 ? between(SPAN - 3, limit) : between(0, limit);
        sequences[s].tokens = sequences[s].prompt + num_steps;
        num_blocks += up_to(sequences[s].tokens, LANES) / LANES;
        context = MAX(context, sequences[s].tokens);
    }
    num_blocks += between(0, 2);
    int32_t *order = malloc(num_blocks * 4);
    if (!order) abort();
    for (int64_t i = 0; i < num_blocks; i++) {
        const int64_t j = between(0, i);
        order[i] = order[j], order[j] = i;
    }

    float *cosines = take_floats(context * m.head_dim / 2), *sines = take_floats(context * m.head_dim / 2);
    for (int64_t t = 0; t < context; t++)
        for (int64_t i = 0; i < m.head_dim / 2; i++) {
            const double angle = t * pow(10000, -2.0 * i / m.head_dim);
            cosines[t * (m.head_dim / 2) + i] = cos(angle), sines[t * (m.head_dim / 2) + i] = sin(angle);
        }
    Layer *layers = take(m.num_layers * sizeof *layers);
    Weights weights[3];
    const int qkv_bias = one_in(3), other_bias = one_in(4);
    const int64_t kv_bytes = num_blocks * narrow * LANES * (m.kv_kind == BF16 ? 2 : 4);
    for (int64_t l = 0; l < m.num_layers; l++) {
        weights[l] = (Weights){random_matrix(kind, mixed + 2 * narrow, m.hidden, 0, qkv_bias),
                               random_matrix(kind, m.hidden, mixed, 0, other_bias),
                               random_matrix(kind, 2 * m.intermediate, m.hidden, 1, other_bias),
                               random_matrix(kind, m.hidden, m.intermediate, 0, other_bias), random_norm(m.hidden),
                               random_norm(m.hidden)};
        layers[l] = (Layer){weights[l].attention_norm, weights[l].mlp_norm, weights[l].qkv.packed,
                            weights[l].out.packed, weights[l].gate_up.packed, weights[l].down.packed, take(kv_bytes),
                            take(kv_bytes)};
    }
    const Matrix head = random_matrix(is_plain ? kind : INT8, vocabulary, m.hidden, 0, one_in(4));
    m.cosines = cosines, m.sines = sines, m.layers = layers, m.norm = random_norm(m.hidden), m.head = head.packed;

    for (int64_t s = 0, used = 0; s < count; s++) {
        Sequence *sequence = sequences + s;
        sequence->blocks = order + used;
        used += up_to(sequence->tokens, LANES) / LANES;
        sequence->embeddings = malloc(sequence->tokens * m.hidden * 4);
        sequence->keys = malloc(m.num_layers * sequence->tokens * narrow * 8);
        sequence->values = malloc(m.num_layers * sequence->tokens * narrow * 8);
        sequence->logits = malloc(num_steps * vocabulary * 8);
        if (!sequence->embeddings || !sequence->keys || !sequence->values || !sequence->logits) abort();
        for (int64_t i = 0; i < sequence->tokens * m.hidden; i++) sequence->embeddings[i] = uniform(-1, 1);
        forward(&m, weights, &head, sequence->embeddings, sequence->tokens, num_steps, sequence->keys,
                sequence->values, sequence->logits);
        if (m.kv_kind == F32)
            sequence->tolerance = float32_tolerance(&m, weights, &head, sequence, num_steps);
        else /* where what is multiplied is narrow, too, it is rounded in every product */
            sequence->tolerance = kind_of_inputs(m.kv_kind) == BF16 ? 0.1 : 0.03;
        prefill_in_chunks(&m, sequence);
    }
    for (int64_t number = 0; number < num_steps; number++) decode_all(&m, sequences, count, number);
    compare_memory(&m, sequences, count, num_blocks);
    if (num_wrong)
        fprintf(stderr,
                "seed %llu: layers %lld, hidden %lld, heads %lld/%lld of %lld, intermediate %lld, vocabulary %lld, "
                "weights %d, keys %lld, sequences %lld\n",
                (unsigned long long)seed, (long long)m.num_layers, (long long)m.hidden, (long long)m.heads,
                (long long)m.kv_heads, (long long)m.head_dim, (long long)m.intermediate, (long long)vocabulary, kind,
                (long long)m.kv_kind, (long long)count);
    for (int64_t s = 0; s < count; s++)
        free(sequences[s].embeddings), free(sequences[s].keys), free(sequences[s].values), free(sequences[s].logits);
    free(order), free(sequences);
    release(0);
}

int main(int count, char **arguments) {
    if (count == 4 && !strcmp(arguments[1], "run")) {
        const uint64_t first = strtoull(arguments[2], NULL, 10), models = strtoull(arguments[3], NULL, 10);
        for (uint64_t seed = first; seed < first + models && !num_wrong; seed++) run_model(seed);
        if (num_wrong) return 1;
        printf("%llu models computed right, relative error up to %.1e\n", (unsigned long long)models, furthest);
        return 0;
    }
    fprintf(stderr, "usage: fuzz run SEED COUNT\n");
    return 2;
}
