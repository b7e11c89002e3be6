// Memory for tests of large offsets, more than a machine has.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

namespace ddpm::test {

// Memory that is allocated only where it is accessed.
class Sparse {
 public:
  explicit Sparse(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Sparse() {
    if (exists()) munmap(memory_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  bool exists() const { return memory_ != MAP_FAILED; }
  float* floats() const { return static_cast<float*>(memory_); }

 private:
  size_t bytes_;
  void* memory_;
};

}  // namespace ddpm::test
