// Stands in for libflexchat_cuda.so on a machine without a usable device.
#include <cstring>

#include "backend/cuda_loader.h"

extern "C" int flexchat_cuda_probe(char* text, size_t size) {
  std::strncpy(text, "the driver is from 1999", size);
  return 0;
}

extern "C" flexchat::Backend* flexchat_cuda_make(int) { return nullptr; }
