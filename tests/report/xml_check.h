// A minimal well-formedness check for the pages and pictures the reports make.
#pragma once

#include <algorithm>
#include <cctype>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace flexchat {

// What is wrong with `text` as XML: tags that do not match, attributes that are not quoted, bare '<' or '&';
// "" if nothing. <!doctype> and the void elements of HTML pass.
inline std::string xml_problem(std::string_view text) {
  static const std::set<std::string, std::less<>> kVoid = {"meta", "br", "hr", "link"};
  std::vector<std::string> open;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '&') {
      const size_t end = text.find(';', i);
      if (end == std::string_view::npos || end - i > 8) return "bare & at " + std::string(text.substr(i, 30));
    }
    if (text[i] != '<') continue;
    const size_t end = text.find('>', i);
    if (end == std::string_view::npos) return "unclosed tag at " + std::string(text.substr(i, 30));
    const std::string_view tag = text.substr(i + 1, end - i - 1);
    i = end;
    if (tag.empty() || tag[0] == '!') continue;
    if (std::count(tag.begin(), tag.end(), '"') % 2 != 0) return "odd quotes in <" + std::string(tag) + ">";
    if (tag.find('<') != std::string_view::npos) return "bare < near <" + std::string(tag) + ">";
    const bool closing = tag[0] == '/';
    size_t n = closing ? 1 : 0;
    while (n < tag.size() && (std::isalnum(static_cast<unsigned char>(tag[n])) != 0)) ++n;
    const std::string name(tag.substr(closing ? 1 : 0, n - (closing ? 1 : 0)));
    if (name.empty()) return "no name in <" + std::string(tag) + ">";
    if (closing) {
      if (open.empty() || open.back() != name) return "</" + name + "> closes nothing";
      open.pop_back();
    } else if (tag.back() != '/' && !kVoid.contains(name)) {
      open.push_back(name);
      if (name == "style") i = text.find("</style>", i) - 1;  // CSS is not XML
    }
  }
  return open.empty() ? "" : "<" + open.back() + "> stays open";
}

}  // namespace flexchat
