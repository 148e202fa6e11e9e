/* Bodies that every instruction set shares: single elements of a weighted sum, and the optimisers' loops.
 *
 * The loops are plain C in a fixed order of operations, with square root and division as IEEE 754 rounds them, so whatever width
 * the compiler picks gives the same bits. All are bound by memory: 12, 20 and 28 bytes for a parameter. Adam after Kingma & Ba
 * 2015 (arXiv:1412.6980), decoupled decay after Loshchilov & Hutter 2019 (arXiv:1711.05101), momentum after Sutskever et al.
 * 2013.
 */
#ifndef FC_AGGREGATE_BODY_H
#define FC_AGGREGATE_BODY_H

#include <math.h>

#include "../isa.h"
#include "aggregate.h"

FC_INLINE float product(const float *const *inputs, const float *weights, int j, int64_t i) { return weights[j] * inputs[j][i]; }

/* The tree over `count` (1 to 4) inputs from `first`. */
FC_INLINE float tree_of_four(const float *const *inputs, const float *weights, int first, int count, int64_t i) {
    float sum = product(inputs, weights, first, i);
    if (count > 1) sum += product(inputs, weights, first + 1, i);
    if (count == 3) sum += product(inputs, weights, first + 2, i);
    if (count == 4) sum += product(inputs, weights, first + 2, i) + product(inputs, weights, first + 3, i);
    return sum;
}

FC_INLINE float tree_element(const float *const *inputs, const float *weights, int count, int64_t i) {
    if (count <= 4) return tree_of_four(inputs, weights, 0, count, i);
    return tree_of_four(inputs, weights, 0, 4, i) + tree_of_four(inputs, weights, 4, count - 4, i);
}

/* Elements [begin, end) one by one. */
FC_INLINE void sum_elements(const float *const *inputs, const float *weights, int count, int64_t begin, int64_t end, float *out,
                            double *squares) {
    for (int64_t i = begin; i < end; i++) {
        const float x = tree_element(inputs, weights, count, i);
        out[i] = x;
        squares[i % FC_AGGREGATE_LANES] += (double)x * x;
    }
}

FC_INLINE void step_sgd_body(float *restrict params, const float *restrict grads, int64_t length, const fc_sgd *sgd) {
    const fc_sgd c = *sgd;
    for (int64_t i = 0; i < length; i++) {
        const float p = params[i], g = c.clip * grads[i] + c.weight_decay * p;
        params[i] = p - c.learning_rate * g;
    }
}

FC_INLINE void step_momentum_body(float *restrict params, const float *restrict grads, float *restrict velocity, int64_t length,
                                  const fc_momentum *momentum) {
    const fc_momentum c = *momentum;
    if (c.nesterov) {
        for (int64_t i = 0; i < length; i++) {
            const float p = params[i], g = c.clip * grads[i] + c.weight_decay * p;
            const float v = c.momentum * velocity[i] + c.gain * g;
            velocity[i] = v;
            params[i] = p - c.learning_rate * (g + c.momentum * v);
        }
        return;
    }
    for (int64_t i = 0; i < length; i++) {
        const float p = params[i], g = c.clip * grads[i] + c.weight_decay * p;
        const float v = c.momentum * velocity[i] + c.gain * g;
        velocity[i] = v;
        params[i] = p - c.learning_rate * v;
    }
}

FC_INLINE void step_adam_body(float *restrict params, const float *restrict grads, float *restrict first, float *restrict second,
                              int64_t length, const fc_adam *adam) {
    const fc_adam c = *adam;
    for (int64_t i = 0; i < length; i++) {
        const float p = params[i], g = c.clip * grads[i] + c.weight_decay * p;
        const float m = first[i] + c.first_rate * (g - first[i]);
        const float v = c.beta2 * second[i] + c.second_rate * (g * g);
        first[i] = m;
        second[i] = v;
        params[i] = c.decay * p - c.step_size * (m / (c.root_scale * sqrtf(v) + c.epsilon));
    }
}

#endif
