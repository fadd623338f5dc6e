// The mods everybody names, as ordinary expressions. Compose masks with && and ||, score mods by passing
// one's result as the next one's score:
//
//   const Expr mask = causal() && (window(256) || sink(4));      // StreamingLLM
//   const Expr mod = softcap(30, alibi(slope));                  // ALiBi first, then the cap
//
// Those without a captured tensor can be named in text as well: "causal && (window(256) || sink(4))".
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "flex/expr.h"

namespace flexchat::flex {

// ---- masks ----------------------------------------------------------------------------------------------
Expr causal();                      // kv <= q
Expr window(const Expr& w);         // q - kv < w: the last w keys, itself included; combine with causal()
Expr sink(const Expr& n);           // kv < n: the first n keys, which every query may see (an attention sink)
Expr document(const Capture& ids);  // ids[b,q] == ids[b,kv]; ids (B, T) or (T) integer over axis pos
Expr prefix_lm(const Capture& length);  // kv <= q || kv < length[b]; length (B) integer
Expr padding(const Capture& length);    // kv < length[b]; length (B) integer

// ---- score mods: `score` may be the result of another mod
// ---------------------------------------------------
Expr alibi(const Capture& slope,
           const Expr& score = variables().score);                     // score - slope[h]*(q - kv); slope (H)
Expr softcap(const Expr& cap, const Expr& score = variables().score);  // cap*tanh(score/cap)
// score + table[h, clamp(q - kv, -max_distance, max_distance) + max_distance];
// table (H, 2*max_distance + 1) over axes h, any.
Expr relative_position(const Capture& table, int64_t max_distance, const Expr& score = variables().score);

// ---- by name, for the parser
// --------------------------------------------------------------------------------
bool is_named_mod(std::string_view name);
std::vector<std::string> named_mod_names();
// Errors: a wrong number of arguments.
Expr make_named_mod(std::string_view name, const std::vector<Expr>& args);

}  // namespace flexchat::flex
