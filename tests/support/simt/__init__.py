"""The CUDA kernels on a CPU: a simulator of the hardware, and what drives it."""
