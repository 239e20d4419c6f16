"""The CPU target: kernels in C++, built once by the toolchain that Inductor would use, and kept in the store."""
