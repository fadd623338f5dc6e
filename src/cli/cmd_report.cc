// flexchat report RUN...: one run's page anew, or several runs beside each other.
#include <fmt/core.h>

#include "base/error.h"
#include "base/file.h"
#include "base/options.h"
#include "cli/command.h"
#include "report/html.h"

namespace flexchat {

int cmd_report(const Words& words) {
  std::vector<std::string> runs;
  std::string out = "report.html";
  Options options("flexchat report",
                  "Training runs as one self-contained HTML page, several over each other.");
  options.add("runs", &runs, "folders of training runs").required();
  options.add("--out", &out, "the page, for several runs; one run's page goes into its folder");
  if (!options.parse(words)) return 0;
  if (runs.size() == 1) {
    fmt::print("report: {}\n", render_train_report(runs[0]).string());
    return 0;
  }
  write_file_atomic(out, compare_report_html({runs.begin(), runs.end()}));
  fmt::print("report: {}\n", out);
  return 0;
}

}  // namespace flexchat
