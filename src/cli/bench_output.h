// Where the result of a benchmark goes: a run folder, and a table or JSON on the terminal.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "base/options.h"
#include "report/table.h"

namespace flexchat {

struct BenchOutput {
  std::string run_id, runs = "runs";
  bool json = false;

  void declare(Options& o);
  // Writes the run folder and prints. Returns the exit code.
  int finish(const Json& summary, const Table& table) const;
};

}  // namespace flexchat
