/* fastcore: gradient aggregation, sparse and quantised kernels, and the executor that runs them.
 *
 * A plain C library: no Python, no allocation inside kernels, no printing, no exit. Every kernel is a slot of one table,
 * filled once from what the CPU and its operating system support (dispatch.c). A driver (`<family>/drive.c`) blocks, packs
 * and partitions, and calls leaf kernels through the table; it has the shape of a step, so that a whole network runs as one
 * array of steps inside a single parallel region (program.c).
 */
#ifndef FASTCORE_H
#define FASTCORE_H

#include <stddef.h>
#include <stdint.h>

#include "aggregate/aggregate.h"
#include "attention/attention.h"
#include "bitmask/bitmask.h"
#include "cpu.h"
#include "dense/dense.h"
#include "int4/int4.h"
#include "nn/nn.h"
#include "quant/quant.h"
#include "sparse/sparse.h"
#include "status.h"
#include "text/text.h"
#include "vision/vision.h"

/* ---- dispatch: one table, one place ---- */

#define FC_SLOTS(SLOT)                                                                                                           \
    FC_AGGREGATE_SLOTS(SLOT)                                                                                                     \
    FC_ATTENTION_SLOTS(SLOT)                                                                                                     \
    FC_BITMASK_SLOTS(SLOT)                                                                                                       \
    FC_DENSE_SLOTS(SLOT)                                                                                                         \
    FC_INT4_SLOTS(SLOT)                                                                                                          \
    FC_NN_SLOTS(SLOT)                                                                                                            \
    FC_QUANT_SLOTS(SLOT)                                                                                                         \
    FC_SPARSE_SLOTS(SLOT)                                                                                                        \
    FC_TEXT_SLOTS(SLOT)                                                                                                          \
    FC_VISION_SLOTS(SLOT)

typedef struct fc_table {
#define FC_DECLARE_SLOT(name) fc_##name##_fn *name;
    FC_SLOTS(FC_DECLARE_SLOT)
#undef FC_DECLARE_SLOT
    /* Blocking constants travel with the kernels that need them. */
    FC_DENSE_TUNING
    FC_QUANT_TUNING
    FC_SPARSE_TUNING
    /* Which variant serves each slot: the ISA suffix of the installed function. */
    struct {
#define FC_DECLARE_VARIANT(name) const char *name;
        FC_SLOTS(FC_DECLARE_VARIANT)
#undef FC_DECLARE_VARIANT
    } variant;
} fc_table;

/* Install `slot_isa` into `slot`; the last lines of every kernel file. */
#define FC_INSTALL(table, slot, isa) ((table)->slot = slot##_##isa, (table)->variant.slot = #isa)

extern fc_table fc_kernels;

/* Rebuild the table with ISAs up to `cap` ("scalar", "avx2", "avx512"; NULL or "" for no cap).
 * Not safe while kernels run. Programs bound before are stale: see fc_generation. */
fc_status fc_set_isa(const char *cap);
/* Counts calls of fc_set_isa: packed weights and programs are valid within one generation only. */
unsigned fc_generation(void);

typedef struct fc_slot_info {
    const char *name;    /* the slot */
    const char *variant; /* the ISA that serves it */
    const char *best;    /* the highest ISA for which a variant was written */
    const char *reason;  /* why `best` was not installed; "" if it was */
} fc_slot_info;
int fc_slot_count(void);
fc_slot_info fc_slot(int index);

/* ---- programs: arrays of bound steps, run by one team ---- */

/* One thread's share of a step. `args` is the step's own struct; all ranks of the team call it, 0 <= rank < size. The result
 * must not depend on `size`. */
typedef void fc_step_fn(const void *args, int rank, int size);

typedef struct fc_program fc_program;
fc_program *fc_program_new(void);
void fc_program_free(fc_program *program);
/* Append a step; `args` (size bytes) are copied. All ranks pass a barrier after each step,
 * but for those of fc_program_overlap. */
fc_status fc_program_add(fc_program *program, fc_step_fn *run, const void *args, size_t size);
/* Leave out the barrier after the last step: what comes next neither reads nor overwrites what it touches. */
void fc_program_overlap(fc_program *program);
int64_t fc_program_length(const fc_program *program);
/* Run all steps on up to `threads` threads. Fewer when the process's one team is taken or cores are contended. */
fc_status fc_program_run(const fc_program *program, int threads);
/* One array of `items` slices outside, and each rank's place for one of them inside. */
typedef struct fc_slices {
    char *outside;
    char *const *inside; /* [ranks] */
    size_t bytes;        /* of a slice */
} fc_slices;

/* The same work for many items: rank r runs programs[r], alone, on its own memory, for whichever item is next. */
typedef struct fc_map {
    fc_program *const *programs; /* [ranks] */
    int ranks;
    const fc_slices *inputs, *outputs;
    int input_count, output_count;
    int64_t items;
} fc_map;
/* Run a map on up to `ranks` threads. What an item gives must not depend on the rank that runs it. */
fc_status fc_program_map(const fc_map *map);
/* Run one step outside a program. */
fc_status fc_run_step(fc_step_fn *run, const void *args, int threads);
/* 1 if built with OpenMP. */
int fc_has_threads(void);

#endif
