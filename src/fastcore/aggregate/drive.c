/* Blocks and threads of the aggregate family, and the tree over more inputs than one pass takes.
 *
 * A weighted sum of more than FAN inputs goes block by block: aligned groups of FAN^k inputs are subtrees of the left-complete
 * tree, so each group is reduced into a tile of one block, and the tiles are added with weights of 1, which multiply exactly.
 * The eight tiles of a level take 512 KiB and stay in L2, while every input is read once and the output written once; smaller
 * tiles cost more in restarted streams (at 64 inputs 10 % with a quarter of the size) than they save in cache.
 */
#include <math.h>

#include "../fastcore.h"
#include "../parallel.h"

/* From this much traffic on, caching the output would only evict others. */
enum { STREAM_BYTES = 4 << 20 };

int64_t fc_aggregate_blocks(int64_t length) { return length / FC_AGGREGATE_BLOCK + (length % FC_AGGREGATE_BLOCK != 0); }

int fc_aggregate_threads(int64_t length, int threads) {
    const int64_t blocks = fc_aggregate_blocks(length);
    if (threads > blocks) threads = (int)blocks;
    return threads > 1 ? threads : 1;
}

double fc_sum_partials(const double *partials, int64_t blocks) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; b++) sum += partials[b];
    return sum;
}

/* The largest power of FAN below count. */
static int64_t group_size(int64_t count) {
    int64_t group = 1;
    while (group < (count + FC_AGGREGATE_FAN - 1) / FC_AGGREGATE_FAN) group *= FC_AGGREGATE_FAN;
    return group;
}

int64_t fc_weighted_sum_scratch(int64_t count) {
    int64_t floats = 0;
    for (; count > FC_AGGREGATE_FAN; count = group_size(count)) floats += FC_AGGREGATE_FAN * FC_AGGREGATE_BLOCK;
    return floats;
}

static double add_lanes(const double *lanes) {
    double sum[FC_AGGREGATE_LANES];
    for (int j = 0; j < FC_AGGREGATE_LANES; j++) sum[j] = lanes[j];
    for (int half = FC_AGGREGATE_LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) sum[j] += sum[j + half];
    return sum[0];
}

static int64_t block_length(int64_t block, int64_t end) {
    return end - block < FC_AGGREGATE_BLOCK ? end - block : FC_AGGREGATE_BLOCK;
}

/* What one call of the leaf writes. */
typedef struct target {
    float *out;
    int stream;
    double *squares;
} target;

/* Reduce inputs [first, first + count) over elements [begin, begin + length), at most a block where count > FAN. */
static void reduce(const fc_weighted_sum_args *a, int64_t first, int64_t count, int64_t begin, int64_t length, target to,
                   float *scratch) {
    static const float ones[FC_AGGREGATE_FAN] = {1, 1, 1, 1, 1, 1, 1, 1};
    const float *sources[FC_AGGREGATE_FAN];
    if (count <= FC_AGGREGATE_FAN) {
        for (int64_t j = 0; j < count; j++) sources[j] = a->inputs[first + j] + begin;
        fc_kernels.weighted_sum_f32(sources, a->weights + first, (int)count, length, to.out, to.stream, to.squares);
        return;
    }
    const int64_t group = group_size(count);
    int groups = 0;
    for (int64_t done = 0; done < count; done += group, groups++) {
        double unused[FC_AGGREGATE_LANES] = {0};
        float *tile = scratch + (int64_t)groups * FC_AGGREGATE_BLOCK;
        const target inner = {tile, 0, unused};
        reduce(a, first + done, count - done < group ? count - done : group, begin, length, inner,
               scratch + FC_AGGREGATE_FAN * FC_AGGREGATE_BLOCK);
        sources[groups] = tile;
    }
    fc_kernels.weighted_sum_f32(sources, ones, groups, length, to.out, to.stream, to.squares);
}

static int worth_streaming(const fc_weighted_sum_args *a) {
    if ((a->count + 1) * a->length < STREAM_BYTES / (int64_t)sizeof(float)) return 0;
    /* In place the lines of the output are in cache already. */
    for (int64_t j = 0; j < a->count; j++)
        if (a->inputs[j] == a->out) return 0;
    return 1;
}

void fc_weighted_sum(const void *args, int rank, int size) {
    const fc_weighted_sum_args *a = args;
    const int stream = worth_streaming(a);
    float *scratch = a->scratch + rank * fc_weighted_sum_scratch(a->count);
    int64_t begin, end;
    fc_partition(a->length, FC_AGGREGATE_BLOCK, rank, size, &begin, &end);
    for (int64_t block = begin; block < end; block += FC_AGGREGATE_BLOCK) {
        double squares[FC_AGGREGATE_LANES] = {0};
        const target to = {a->out + block, stream, squares};
        reduce(a, 0, a->count, block, block_length(block, end), to, scratch);
        a->partials[block / FC_AGGREGATE_BLOCK] = add_lanes(squares);
    }
}

void fc_sum_of_squares(const void *args, int rank, int size) {
    const fc_sum_of_squares_args *a = args;
    int64_t begin, end;
    fc_partition(a->length, FC_AGGREGATE_BLOCK, rank, size, &begin, &end);
    for (int64_t block = begin; block < end; block += FC_AGGREGATE_BLOCK) {
        double squares[FC_AGGREGATE_LANES] = {0};
        fc_kernels.sum_of_squares_f32(a->x + block, block_length(block, end), squares);
        a->partials[block / FC_AGGREGATE_BLOCK] = add_lanes(squares);
    }
}

void fc_sgd_step(const void *args, int rank, int size) {
    const fc_sgd_args *a = args;
    int64_t i, end;
    fc_partition(a->length, FC_AGGREGATE_BLOCK, rank, size, &i, &end);
    fc_kernels.step_sgd_f32(a->params + i, a->grads + i, end - i, &a->sgd);
}

void fc_momentum_step(const void *args, int rank, int size) {
    const fc_momentum_args *a = args;
    int64_t i, end;
    fc_partition(a->length, FC_AGGREGATE_BLOCK, rank, size, &i, &end);
    fc_kernels.step_momentum_f32(a->params + i, a->grads + i, a->velocity + i, end - i, &a->momentum);
}

void fc_adam_step(const void *args, int rank, int size) {
    const fc_adam_args *a = args;
    int64_t i, end;
    fc_partition(a->length, FC_AGGREGATE_BLOCK, rank, size, &i, &end);
    fc_kernels.step_adam_f32(a->params + i, a->grads + i, a->first + i, a->second + i, end - i, &a->adam);
}

fc_adam fc_adam_constants(double learning_rate, double beta1, double beta2, double epsilon, double weight_decay, int decoupled,
                          int64_t step, double clip) {
    const double correction1 = 1 - pow(beta1, (double)step), correction2 = 1 - pow(beta2, (double)step);
    return (fc_adam){
        .weight_decay = decoupled ? 0 : (float)weight_decay,
        .clip = (float)clip,
        .decay = decoupled ? (float)(1 - learning_rate * weight_decay) : 1,
        .first_rate = (float)(1 - beta1),
        .beta2 = (float)beta2,
        .second_rate = (float)(1 - beta2),
        .root_scale = (float)(1 / sqrt(correction2)),
        .epsilon = (float)epsilon,
        .step_size = (float)(learning_rate / correction1),
    };
}
