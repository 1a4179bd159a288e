// The CPU kernels compiled for avx512bf16; setup.py gives this file its flags by its suffix.
#define LOWRANK_ISA isa_avx512bf16
#include "cpu/kernels/table.h"

LOWRANK_DEFINE_KERNEL_TABLE(avx512bf16)
