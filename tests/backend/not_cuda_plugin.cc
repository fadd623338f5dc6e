// A shared library that is not the CUDA library (cuda_loader_test.cc).
extern "C" int not_cuda() { return 0; }
