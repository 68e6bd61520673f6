"""CUDA kernels compiled by NVRTC: sources, packing, launch shapes, operators."""
