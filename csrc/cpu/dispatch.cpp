// Chooses the instruction set at first use.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace fastdiv {
namespace {

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const InstructionSet* by_name(const char* name) {
  for (int i = 0; i < kInstructionSetCount; ++i)
    if (std::strcmp(kInstructionSets[i].name, name) == 0 && kInstructionSets[i].supported())
      return &kInstructionSets[i];
  return nullptr;
}

const InstructionSet* choose() {
  if (const char* forced = std::getenv("FASTDIV_CPU_ISA"))
    if (const InstructionSet* isa = by_name(forced)) return isa;
  if (const char* torch = std::getenv("ATEN_CPU_CAPABILITY")) {
    const char* name = std::strcmp(torch, "default") == 0 ? "baseline" : torch;
    if (const InstructionSet* isa = by_name(name)) return isa;
  }
  for (int i = 0; i < kInstructionSetCount; ++i)
    if (kInstructionSets[i].supported()) return &kInstructionSets[i];
  return &kInstructionSets[kInstructionSetCount - 1];
}

std::atomic<const InstructionSet*> chosen{nullptr};

}  // namespace

const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512, avx512::find_kernels},
    {"avx2", has_avx2, avx2::find_kernels},
#endif
    {"baseline", always, baseline::find_kernels},
};
const int kInstructionSetCount = sizeof(kInstructionSets) / sizeof(kInstructionSets[0]);

const InstructionSet& instruction_set() {
  const InstructionSet* isa = chosen.load();
  if (!isa) chosen.store(isa = choose());
  return *isa;
}

bool set_instruction_set(const char* name) {
  const InstructionSet* isa = by_name(name);
  if (isa) chosen.store(isa);
  return isa != nullptr;
}

}  // namespace fastdiv
