"""The CUDA kernels on a CPU: a simulator of the hardware, and the Python code that drives it."""
