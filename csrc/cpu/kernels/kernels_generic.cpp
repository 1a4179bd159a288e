// The CPU kernels compiled for generic; setup.py gives this file its flags by its suffix.
#define LOWRANK_ISA isa_generic
#include "cpu/kernels/table.h"

LOWRANK_DEFINE_KERNEL_TABLE(generic)
