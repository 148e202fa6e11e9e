/* Fills the kernel table: the scalar reference first, then each ISA in rising order. Nothing else knows ISAs. */
#include <string.h>

#include "fastcore.h"

typedef void install_fn(fc_table *table);

enum { FAMILIES = 10 };

typedef struct tier {
    const char *isa;                /* the suffix of its kernels */
    const char *cap;                /* the value of GRISTMILL_ISA that still admits it */
    const char *needs;              /* what to say when the CPU lacks it */
    unsigned flags;                 /* CPU flags it needs */
    install_fn *installs[FAMILIES]; /* of the families that have a variant, in any order */
} tier;

#define EVERY_FAMILY(isa)                                                                                                        \
    {fc_aggregate_install_##isa, fc_attention_install_##isa, fc_bitmask_install_##isa, fc_dense_install_##isa,                   \
     fc_int4_install_##isa,      fc_nn_install_##isa,        fc_quant_install_##isa,   fc_sparse_install_##isa,                  \
     fc_text_install_##isa,      fc_vision_install_##isa}

static const tier tiers[] = {
    {"scalar", "scalar", "", 0, EVERY_FAMILY(scalar)},
#ifdef FC_X86
    {"avx2", "avx2", "AVX2 and FMA", FC_CPU_AVX2, EVERY_FAMILY(avx2)},
    {"avx512", "avx512", "AVX-512 F/BW/DQ/VL", FC_CPU_AVX512, EVERY_FAMILY(avx512)},
    {"avx512vnni",
     "avx512",
     "AVX-512 VNNI",
     FC_CPU_AVX512 | FC_CPU_AVX512VNNI,
     {fc_int4_install_avx512vnni, fc_quant_install_avx512vnni, fc_sparse_install_avx512vnni}},
    {"avx512vbmi2",
     "avx512",
     "AVX-512 VNNI and VBMI2",
     FC_CPU_AVX512 | FC_CPU_AVX512VNNI | FC_CPU_AVX512VBMI2,
     {fc_bitmask_install_avx512vbmi2}},
    {"avx512bf16",
     "avx512",
     "AVX-512 BF16",
     FC_CPU_AVX512 | FC_CPU_AVX512BF16,
     {fc_attention_install_avx512bf16, fc_dense_install_avx512bf16}},
#endif
};
enum { TIERS = sizeof tiers / sizeof *tiers };

static const char *const caps[] = {"scalar", "avx2", "avx512"};
enum { CAPS = sizeof caps / sizeof *caps };

fc_table fc_kernels;
static fc_table written; /* the highest variant that exists for each slot, whether or not this CPU can run it */
static unsigned generation, cpu_flags;
static int cap_level;

static int level_of(const char *cap) {
    for (int i = 0; i < CAPS; i++)
        if (strcmp(cap, caps[i]) == 0) return i;
    return -1;
}

static void install(fc_table *table, const tier *t) {
    for (int i = 0; i < FAMILIES; i++)
        if (t->installs[i]) t->installs[i](table);
}

fc_status fc_set_isa(const char *cap) {
    const int level = cap && *cap ? level_of(cap) : CAPS - 1;
    if (level < 0) return FC_BAD_ARGUMENT;
    cap_level = level;
    cpu_flags = fc_cpu_flags();
    for (int i = 0; i < TIERS; i++) {
        install(&written, &tiers[i]);
        if (level_of(tiers[i].cap) <= level && (cpu_flags & tiers[i].flags) == tiers[i].flags) install(&fc_kernels, &tiers[i]);
    }
    generation++;
    return FC_OK;
}

unsigned fc_generation(void) { return generation; }

static const char *const slot_names[] = {
#define FC_SLOT_NAME(name) #name,
    FC_SLOTS(FC_SLOT_NAME)
#undef FC_SLOT_NAME
};

int fc_slot_count(void) { return (int)(sizeof slot_names / sizeof *slot_names); }

/* The cap is named before the CPU: lifting it is in the user's hands. */
static const char *reason_against(const char *best) {
    for (int i = TIERS - 1; i >= 0; i--) {
        const int capped = level_of(tiers[i].cap) > cap_level;
        if (strcmp(best, tiers[i].isa) != 0) continue;
        if (capped) return "capped by GRISTMILL_ISA or set_isa";
        if ((cpu_flags & tiers[i].flags) != tiers[i].flags) return tiers[i].needs;
    }
    return "";
}

fc_slot_info fc_slot(int index) {
    const char *const *variants = (const char *const *)&fc_kernels.variant;
    const char *const *best = (const char *const *)&written.variant;
    fc_slot_info info = {slot_names[index], variants[index], best[index], ""};
    if (strcmp(info.variant, info.best) != 0) info.reason = reason_against(info.best);
    return info;
}
