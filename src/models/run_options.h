// How a model's attention and loss are computed: the options, declared once for all commands that run one,
// and what run records say about it.
#pragma once

#include <string>

#include "base/options.h"
#include "models/gpt.h"

namespace flexchat {

struct AttentionOptions {
  std::string attention = "sdpa";

  void declare(Options& o, const char* group = nullptr);
  // Error: a word that is neither a path nor a kernel of the model's backend, nor both as PATH:KERNEL.
  void apply(Gpt& model) const;
};

struct HeadLossOptions {
  std::string loss = "auto";
  int64_t loss_memory = 0;  // bytes; 0: the loss's own

  void declare(Options& o, const char* group = nullptr);
  void apply(Gpt& model) const;
};

// What runs, from the plans that the model holds: {"path": "sdpa", "kernel": "cuda_mma", "reason": why that
// one}. Where several plans differ, each kernel and reason once, separated by "; ".
Json attention_record(const Gpt& model);
std::string attention_line(const Gpt& model);  // the same for people

// {"backend", "reason", "panel_rows", "panel_columns", "one_pass", "memory_bytes"}
Json loss_record(const LossPlan& plan);
std::string loss_line(const LossPlan& plan);

}  // namespace flexchat
