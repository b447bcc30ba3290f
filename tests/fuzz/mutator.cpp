// libFuzzer's mutations, half of them kept to the entropy-coded data of the first JPEG: a header is
// most of a small file, and most changes of one end in a refusal.
#include "fuzz.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned int seed) {
  using imseq::fuzz::kOptionBytes;
  imseq_header header;
  if (seed % 2 == 0 || size <= kOptionBytes ||
      imseq_read_header(data, size - kOptionBytes, &header, nullptr) != IMSEQ_OK) {
    return LLVMFuzzerMutate(data, size, max_size);
  }
  const auto head_size = static_cast<size_t>(header.entropy_offset);
  const size_t scan_size = size - kOptionBytes - head_size;
  if (scan_size == 0) return LLVMFuzzerMutate(data, size, max_size);
  const imseq::fuzz::Bytes options(data + size - kOptionBytes, kOptionBytes);
  const size_t new_size =
      LLVMFuzzerMutate(data + head_size, scan_size, max_size - kOptionBytes - head_size);
  std::memcpy(data + head_size + new_size, options.data(), kOptionBytes);
  return head_size + new_size + kOptionBytes;
}
