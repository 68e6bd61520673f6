// Three arrays of floats to where a captured frame reads them.

extern "C" __global__ void copy_inputs(const float* a, const float* b, const float* c, float* to_a, float* to_b, float* to_c,
                                       int of_a, int of_b, int of_c) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < of_a) to_a[i] = a[i];
    if (i < of_b) to_b[i] = b[i];
    if (i < of_c) to_c[i] = c[i];
}
