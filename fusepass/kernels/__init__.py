"""The Triton kernels, one family a file. Nothing here is imported until an op first launches one."""
