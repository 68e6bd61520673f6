"""Triton kernels, their packing, launch shapes and operators. Importing the device code needs Triton."""
