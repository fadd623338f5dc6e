// cuDNN, whose attention is a baseline (backend/cuda/cudnn_attention.cc). It is never linked: it is opened
// when somebody asks for it, and the program starts and runs without it.
#pragma once

#include <string>

namespace flexchat {

struct CudnnLibrary {
  void* handle = nullptr;  // for dlsym; null when it cannot be used
  std::string version;     // "9.19.0"
  std::string path;
  std::string why;  // when it cannot be used: one line that says why and how to get it
};

// FLEXCHAT_CUDNN where that is set, else libcudnn.so.9 from the loader's places, the wheels of
// scripts/setup.sh among them. One older than the headers of this build cannot be used. Looked for once.
const CudnnLibrary& cudnn_library();

}  // namespace flexchat
