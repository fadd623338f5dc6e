// What every command that runs a trained model asks for, declared once.
#pragma once

#include <memory>
#include <string>

#include "backend/device_options.h"
#include "base/options.h"
#include "engine/load_model.h"
#include "models/run_options.h"

namespace flexchat {

struct ModelOptions {
  std::string model, tokenizer;
  DeviceOptions compute;
  AttentionOptions attention;

  void declare(Options& o);

  struct Opened {
    std::unique_ptr<Backend> backend;  // outlives the model
    LoadedModel loaded;
  };
  // Sets the number of threads and loads the model. Errors: as load_model, an unknown --attention.
  Opened open() const;
};

}  // namespace flexchat
