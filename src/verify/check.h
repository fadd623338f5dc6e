// One comparison of a computed tensor with what it should be, and the table of them.
#pragma once

#include <string>
#include <vector>

#include "base/options.h"
#include "base/tensor.h"

namespace flexchat {

struct Check {
  std::string name;     // "grad.lm_head.weight"
  double max_abs = 0;   // largest |got - want|
  double mean_abs = 0;  // mean |got - want|
  double max_rel = 0;   // relative error of the whole tensor: |got - want|_2 / |want|_2
  std::string measure;  // which of the two the limit is on: "max_abs" or "max_rel"
  double limit = 0;
  bool pass = false;  // NaN never passes
};

// Infinities of the same sign are equal. Both in host memory, any dtypes, the same number of elements (Error
// otherwise).
Check compare(std::string name, const Tensor& got, const Tensor& want, std::string measure, double limit);

// |x|_2, in host memory.
double norm(const Tensor& x);

Json checks_to_json(const std::vector<Check>& checks);
std::string checks_table(const std::vector<Check>& checks);
bool all_pass(const std::vector<Check>& checks);

}  // namespace flexchat
