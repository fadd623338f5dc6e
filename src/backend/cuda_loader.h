// The CUDA backend lives in a shared library beside the program, so that one binary runs with and without a
// GPU.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "backend/backend.h"

namespace flexchat {

// What the library offers, with C linkage under the names flexchat_cuda_probe and flexchat_cuda_make.
// Probe returns the number of usable devices and writes a NUL-terminated text of at most `size` bytes: one
// line for each device in the order of their ordinals, or, when no device is usable, one line that says why.
// It throws nothing. Make gives a backend that the caller deletes; it throws Error or RunError.
using CudaProbe = int(char* text, size_t size);
using CudaMake = Backend*(int ordinal);

// A library that has been opened, or the reason why it cannot be used. It stays in memory for good: its code
// may run as long as the process does.
class CudaLibrary {
 public:
  explicit CudaLibrary(const std::filesystem::path& path);  // throws nothing of its own: see why()
  // One line: what is missing and how to get it. Empty when there is a usable device.
  const std::string& why() const { return why_; }
  const std::string& devices() const { return devices_; }  // as cuda_devices()
  std::unique_ptr<Backend> make(int ordinal) const;        // throws Error with why() when not usable

 private:
  std::string why_, devices_;
  CudaMake* make_ = nullptr;
};

// The three below use one library: libflexchat_cuda.so from the program's folder, or the file that the
// environment variable FLEXCHAT_CUDA_LIBRARY names. It is opened at the first call and never again.

// Is there a device to run on? When not, *why (if given) says what is missing and how to get it, in one line:
// the library, the CUDA libraries it needs, the driver, a device, a supported architecture.
bool cuda_available(std::string* why = nullptr);

// Has this process opened the library, so that asking for devices costs nothing more?
bool cuda_opened();

// The backend of device `ordinal`. Errors: as cuda_available, or no such device.
std::unique_ptr<Backend> make_cuda_backend(int ordinal = 0);

// "NVIDIA H200, sm_90, 132 SMs, 139.8 GiB, driver 580.159, CUDA 13.0", one line a device, no newline at the
// end; empty when not available. CUDA is the version that the library was built with.
std::string cuda_devices();

}  // namespace flexchat
