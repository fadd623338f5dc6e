// FLEXCHAT_HOST_DEVICE: a function that nvcc compiles for both sides.
#pragma once

#ifdef __CUDACC__
#define FLEXCHAT_HOST_DEVICE __host__ __device__
#else
#define FLEXCHAT_HOST_DEVICE
#endif
