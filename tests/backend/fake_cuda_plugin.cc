// Stands in for libflexchat_cuda.so in cuda_loader_test.cc: two made-up devices; making a backend throws what
// the ordinal asks for.
#include <cstring>

#include "backend/cuda_loader.h"
#include "base/error.h"

extern "C" int flexchat_cuda_probe(char* text, size_t size) {
  std::strncpy(text, "Fake A, sm_90\nFake B, sm_100", size);
  return 2;
}

extern "C" flexchat::Backend* flexchat_cuda_make(int ordinal) {
  if (ordinal == 0) flexchat::fail_run("device {} broke", ordinal);
  flexchat::fail("there is no device cuda:{}", ordinal);
}
