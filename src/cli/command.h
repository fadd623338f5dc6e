// A command of the program: one file each, which parses, calls and prints.
#pragma once

#include <string>
#include <vector>

namespace flexchat {

using Words = std::vector<std::string>;  // the words after the command's own name

// Each returns the exit code: 0 pass, 1 a check failed, 2 bad usage or input (normally thrown as Error).
int cmd_train(const Words& words);
int cmd_generate(const Words& words);
int cmd_eval(const Words& words);
int cmd_verify(const Words& words);
int verify_attention_command(const Words& words);
int cmd_tokenizer(const Words& words);
int cmd_bench(const Words& words);
int bench_attention(const Words& words);
int bench_train(const Words& words);
int bench_loss(const Words& words);
int bench_ops(const Words& words);
int cmd_info(const Words& words);
int cmd_mask(const Words& words);
int cmd_report(const Words& words);
int cmd_profile(const Words& words);

// What the program was called with, its command first.
int run_command(const Words& words);

// The second word of a command with several: picks one, prints --help, or says what is allowed.
struct Subcommand {
  const char* name;
  int (*run)(const Words& words);
  const char* summary;
};
int run_subcommand(const char* command, const std::vector<Subcommand>& known, const Words& words);

}  // namespace flexchat
