// Which samples' checksums were right.
#pragma once

#include <cstdint>
#include <vector>

namespace imseq {

// A set of samples, a bit for each. Decoders look and add at the same time.
class SampleSet {
 public:
  // Makes room for samples below num_samples; not while others look or add.
  void grow(int64_t num_samples) {
    const size_t num_words = static_cast<size_t>(num_samples + 63) / 64;
    if (num_words > words_.size()) words_.resize(num_words);
  }
  bool has(int64_t sample) const {
    return (__atomic_load_n(&words_[sample / 64], __ATOMIC_RELAXED) & bit(sample)) != 0;
  }
  void clear() {
    for (uint64_t& word : words_) __atomic_store_n(&word, uint64_t{0}, __ATOMIC_RELAXED);
  }
  void add(int64_t sample) {
    __atomic_fetch_or(&words_[sample / 64], bit(sample), __ATOMIC_RELAXED);
  }

 private:
  static uint64_t bit(int64_t sample) { return uint64_t{1} << (sample % 64); }

  std::vector<uint64_t> words_;
};

}  // namespace imseq
