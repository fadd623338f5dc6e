// Where a command computes and in which dtype: declared once for all commands.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"
#include "base/options.h"

namespace flexchat {

struct DeviceOptions {
  std::string device = "cpu", dtype = "f32";
  int64_t threads;

  DeviceOptions();
  void declare(Options& o, const char* group = nullptr);

  // Sets the number of threads and makes the backend. Errors: an unknown or missing device.
  std::unique_ptr<Backend> open() const;
  // The dtype of activations: the reference backend computes in f64 whatever `dtype` says.
  DType compute_dtype() const;
};

}  // namespace flexchat
