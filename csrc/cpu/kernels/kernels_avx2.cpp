// The CPU kernels compiled for avx2; setup.py gives this file its flags by its suffix.
#define LOWRANK_ISA isa_avx2
#include "cpu/kernels/table.h"

LOWRANK_DEFINE_KERNEL_TABLE(avx2)
