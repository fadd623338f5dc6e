#include "verify/check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "report/table.h"

namespace flexchat {

Check compare(std::string name, const Tensor& got, const Tensor& want, std::string measure, double limit) {
  check(got.numel() == want.numel(), "{}: computed {} but expected {}", name, shape_string(got.shape()),
        shape_string(want.shape()));
  Check c{std::move(name), 0, 0, 0, std::move(measure), limit, false};
  double error = 0, size = 0;
  bool finite = true;
  for (int64_t i = 0; i < got.numel(); ++i) {
    const double g = got.get(i), w = want.get(i);
    if (g == w && std::isinf(g)) continue;
    const double d = std::abs(g - w);
    finite = finite && std::isfinite(g) && std::isfinite(w);
    c.max_abs = std::max(c.max_abs, d);
    c.mean_abs += d / static_cast<double>(got.numel());
    error += d * d;
    size += w * w;
  }
  c.max_rel = size > 0 ? std::sqrt(error / size) : std::sqrt(error);
  if (!finite) c.max_abs = c.mean_abs = c.max_rel = std::numeric_limits<double>::quiet_NaN();
  c.pass = (c.measure == "max_abs" ? c.max_abs : c.max_rel) <= limit;
  return c;
}

double norm(const Tensor& x) {
  double squares = 0;
  for (int64_t i = 0; i < x.numel(); ++i) squares += x.get(i) * x.get(i);
  return std::sqrt(squares);
}

Json checks_to_json(const std::vector<Check>& checks) {
  Json out = Json::array();
  for (const Check& c : checks) {
    out.push_back({{"check", c.name},
                   {"max_abs", c.max_abs},
                   {"mean_abs", c.mean_abs},
                   {"max_rel", c.max_rel},
                   {"limit", fmt::format("{} <= {:.3g}", c.measure, c.limit)},
                   {"pass", c.pass}});
  }
  return out;
}

std::string checks_table(const std::vector<Check>& checks) {
  Table table({"check", "max_abs", "mean_abs", "max_rel", "limit", "pass"});
  for (const Check& c : checks) {
    table.row({c.name, fmt::format("{:.2e}", c.max_abs), fmt::format("{:.2e}", c.mean_abs),
               fmt::format("{:.2e}", c.max_rel), fmt::format("{} <= {:.3g}", c.measure, c.limit),
               c.pass ? "pass" : "FAIL"});
  }
  return table.text();
}

bool all_pass(const std::vector<Check>& checks) {
  return !checks.empty() && std::all_of(checks.begin(), checks.end(), [](const Check& c) { return c.pass; });
}

}  // namespace flexchat
