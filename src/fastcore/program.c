/* The executor: one parallel region per run, the team walks the steps together, a barrier after each. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "fastcore.h"
#include "parallel.h"

typedef struct step {
    fc_step_fn *run;
    void *args;
    int overlaps; /* the next step may start before all ranks are done with this one */
} step;

struct fc_program {
    step *steps;
    int64_t length, capacity;
    unsigned generation;
};

fc_program *fc_program_new(void) {
    fc_program *program = calloc(1, sizeof *program);
    if (program) program->generation = fc_generation();
    return program;
}

void fc_program_free(fc_program *program) {
    if (!program) return;
    for (int64_t i = 0; i < program->length; i++) free(program->steps[i].args);
    free(program->steps);
    free(program);
}

static fc_status reserve(fc_program *program) {
    if (program->length < program->capacity) return FC_OK;
    const int64_t capacity = program->capacity ? program->capacity * 2 : 16;
    step *steps = realloc(program->steps, (size_t)capacity * sizeof *steps);
    if (!steps) return FC_NO_MEMORY;
    program->steps = steps;
    program->capacity = capacity;
    return FC_OK;
}

fc_status fc_program_add(fc_program *program, fc_step_fn *run, const void *args, size_t size) {
    if (reserve(program) != FC_OK) return FC_NO_MEMORY;
    void *copy = malloc(size ? size : 1);
    if (!copy) return FC_NO_MEMORY;
    memcpy(copy, args, size);
    program->steps[program->length++] = (step){.run = run, .args = copy};
    return FC_OK;
}

void fc_program_overlap(fc_program *program) {
    if (program->length) program->steps[program->length - 1].overlaps = 1;
}

int64_t fc_program_length(const fc_program *program) { return program->length; }

typedef struct walk {
    const step *steps;
    int64_t length;
    fc_barrier barrier;
} walk;

static void walk_steps(void *context, int rank, int size) {
    walk *w = context;
    for (int64_t i = 0; i < w->length; i++) {
        w->steps[i].run(w->steps[i].args, rank, size);
        if (i + 1 < w->length && !w->steps[i].overlaps) fc_barrier_wait(&w->barrier, size);
    }
}

fc_status fc_program_run(const fc_program *program, int threads) {
    if (program->generation != fc_generation()) return FC_STALE;
    walk w = {.steps = program->steps, .length = program->length};
    fc_team_run(walk_steps, &w, threads);
    return FC_OK;
}

typedef struct mapping {
    const fc_map *map;
    _Atomic int64_t next;
} mapping;

static void walk_items(void *context, int rank, int size) {
    (void)size;
    mapping *m = context;
    const fc_map *map = m->map;
    const fc_program *program = map->programs[rank];
    for (int64_t item; (item = atomic_fetch_add_explicit(&m->next, 1, memory_order_relaxed)) < map->items;) {
        for (int i = 0; i < map->input_count; i++) {
            const fc_slices *s = &map->inputs[i];
            memcpy(s->inside[rank], s->outside + item * (int64_t)s->bytes, s->bytes);
        }
        for (int64_t i = 0; i < program->length; i++) program->steps[i].run(program->steps[i].args, 0, 1);
        for (int i = 0; i < map->output_count; i++) {
            const fc_slices *s = &map->outputs[i];
            memcpy(s->outside + item * (int64_t)s->bytes, s->inside[rank], s->bytes);
        }
    }
}

fc_status fc_program_map(const fc_map *map) {
    for (int rank = 0; rank < map->ranks; rank++)
        if (map->programs[rank]->generation != fc_generation()) return FC_STALE;
    mapping m = {.map = map};
    fc_pool_run(walk_items, &m, map->items < map->ranks ? (int)map->items : map->ranks);
    return FC_OK;
}

fc_status fc_run_step(fc_step_fn *run, const void *args, int threads) {
    const step one = {.run = run, .args = (void *)args};
    walk w = {.steps = &one, .length = 1};
    fc_team_run(walk_steps, &w, threads);
    return FC_OK;
}

int fc_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
