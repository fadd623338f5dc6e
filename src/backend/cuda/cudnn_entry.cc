// The functions of cuDNN that its frontend calls, forwarded to the library opened at run time
// (backend/cudnn_library.h). Hidden: cuDNN's own libraries must not find these in place of theirs.
#ifdef FLEXCHAT_CUDNN

#include <dlfcn.h>

#pragma GCC visibility push(hidden)
#include <cudnn.h>
#pragma GCC visibility pop

#include "backend/cudnn_library.h"
#include "base/error.h"

namespace {

template <class Function>
Function* find(Function*, const char* name) {
  void* const library = flexchat::cudnn_library().handle;
  void* const address = library == nullptr ? nullptr : ::dlsym(library, name);
  if (address == nullptr) flexchat::fail_run("'{}' has no {}", flexchat::cudnn_library().path, name);
  return reinterpret_cast<Function*>(address);
}

}  // namespace

#define FORWARD(name, ...)                          \
  static auto* const function = find(&name, #name); \
  return function(__VA_ARGS__)

cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) { FORWARD(cudnnCreate, handle); }
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  FORWARD(cudnnSetStream, handle, stream);
}
cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t* stream) {
  FORWARD(cudnnGetStream, handle, stream);
}
size_t cudnnGetVersion() { FORWARD(cudnnGetVersion); }
const char* cudnnGetErrorString(cudnnStatus_t status) { FORWARD(cudnnGetErrorString, status); }
void cudnnGetLastErrorString(char* message, size_t size) { FORWARD(cudnnGetLastErrorString, message, size); }
cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type,
                                           cudnnBackendDescriptor_t* descriptor) {
  FORWARD(cudnnBackendCreateDescriptor, type, descriptor);
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  FORWARD(cudnnBackendDestroyDescriptor, descriptor);
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor) {
  FORWARD(cudnnBackendFinalize, descriptor);
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t count,
                                       const void* elements) {
  FORWARD(cudnnBackendSetAttribute, descriptor, name, type, count, elements);
}
cudnnStatus_t cudnnBackendGetAttribute(const cudnnBackendDescriptor_t descriptor,
                                       cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                                       int64_t capacity, int64_t* count, void* elements) {
  FORWARD(cudnnBackendGetAttribute, descriptor, name, type, capacity, count, elements);
}
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan,
                                  cudnnBackendDescriptor_t variant_pack) {
  FORWARD(cudnnBackendExecute, handle, plan, variant_pack);
}

#undef FORWARD

#endif
