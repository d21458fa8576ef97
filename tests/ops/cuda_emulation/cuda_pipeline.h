#pragma once
#include "cuda_runtime.h"

// Copies land when their thread waits for them; from the beginning until then there is NaN.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulation::require(reinterpret_cast<uintptr_t>(to) % bytes == 0 &&
                         reinterpret_cast<uintptr_t>(from) % bytes == 0,
                     "copy not aligned");
  memset(to, 0xff, bytes);
  emulation::copies().push_back({to, from, bytes, false});
}
inline void __pipeline_commit() {
  for (emulation::Copy& copy : emulation::copies()) copy.committed = true;
}
inline void __pipeline_wait_prior(size_t prior) {
  emulation::require(prior == 0, "waits for some only");
  std::erase_if(emulation::copies(), [](const emulation::Copy& copy) {
    if (copy.committed) memcpy(copy.to, copy.from, copy.bytes);
    return copy.committed;
  });
}
