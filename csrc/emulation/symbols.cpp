#include "emulation/symbols.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <sstream>

namespace fused_ops::emulation {
namespace {

// What addr2line says of a code address: pairs of lines, function and file:line, the innermost inlined one first.
std::string ask(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return "";
  const auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::ostringstream command;
  command << "addr2line -f -C -i -e '" << info.dli_fname << "' 0x" << std::hex << offset << " 2>/dev/null";
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.str().c_str(), "r"), pclose);
  std::string text;
  char part[512];
  while (pipe && fgets(part, sizeof part, pipe.get()) != nullptr) text += part;
  return text;
}

std::string line(const std::string& text, size_t number) {
  std::istringstream lines(text);
  std::string found;
  for (size_t i = 0; i <= number; ++i) if (!std::getline(lines, found)) return "";
  return found;
}

}  // namespace

std::string symbol_name(const void* function) {
  std::string name = line(ask(function), 0);
  if (name.empty() || name == "??") return "a kernel";
  if (name.starts_with("void ")) name.erase(0, 5);
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t at; (at = name.find(unnamed)) != std::string::npos;) name.erase(at, unnamed.size());
  return name.substr(0, name.find('('));
}

std::string line_of_code(const void* pc) {
  const std::string text = ask(static_cast<const char*>(pc) - 1);
  std::string innermost = line(text, 1), found = innermost;
  for (size_t i = 1; !line(text, i).empty(); i += 2) {  // of what was inlined, the line in a kernel's own file
    found = line(text, i);
    if (found.find("/emulation/") == std::string::npos && found.find("/include/") == std::string::npos) break;
    found = innermost;
  }
  return found.empty() ? "an unknown line" : found.substr(0, found.find(" (discriminator"));
}

}  // namespace fused_ops::emulation
