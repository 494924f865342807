// Names and lines of code addresses, for messages.
#pragma once

#include <string>

namespace fused_ops::emulation {

std::string symbol_name(const void* function);
std::string line_of_code(const void* pc);

}  // namespace fused_ops::emulation
