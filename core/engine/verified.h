// Which samples' bytes matched their checksums.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace imseq {

// A set of samples, a bit for each. When a file has changed, the set is cleared and its generation
// is raised. A block is stamped with the generation in which its file was opened: bytes that were
// read before a change can't add their samples to the set, nor are they taken for those verified
// since. Thread-safe.
class VerifiedSamples {
 public:
  // Makes room for samples below num_samples; not beside has() and add().
  void grow(int64_t num_samples) {
    std::lock_guard lock(mutex_);
    const size_t num_words = static_cast<size_t>(num_samples + 63) / 64;
    if (num_words > words_.size()) words_.resize(num_words);
  }

  // The stamp of a block that is about to be read from a file of this version.
  int64_t generation_of(const std::string& path, uint64_t version) {
    std::lock_guard lock(mutex_);
    const auto [found, is_new] = versions_.try_emplace(path, version);
    if (!is_new && std::exchange(found->second, version) != version) {
      generation_.fetch_add(1, std::memory_order_relaxed);
      for (uint64_t& word : words_) __atomic_store_n(&word, uint64_t{0}, __ATOMIC_RELAXED);
    }
    return generation();
  }

  // The stamp of a block that is not read from a file.
  int64_t generation() const { return generation_.load(std::memory_order_relaxed); }

  bool has(int64_t sample, int64_t generation_of_block) const {
    // In this order: a bit that was added in a later generation is never taken for an older one.
    return (__atomic_load_n(&words_[sample / 64], __ATOMIC_ACQUIRE) & bit(sample)) != 0 &&
           generation() == generation_of_block;
  }

  void add(int64_t sample, int64_t generation_of_block) {
    std::lock_guard lock(mutex_);
    if (generation() != generation_of_block) return;
    __atomic_fetch_or(&words_[sample / 64], bit(sample), __ATOMIC_RELEASE);
  }

 private:
  static uint64_t bit(int64_t sample) { return uint64_t{1} << (sample % 64); }

  std::mutex mutex_;
  std::vector<uint64_t> words_;
  std::atomic<int64_t> generation_{0};
  std::unordered_map<std::string, uint64_t> versions_;  // of files, as last read
};

}  // namespace imseq
