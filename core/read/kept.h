// Blocks that stay in memory from epoch to epoch, shared by the processes of a machine.
#pragma once

#include <cstdint>

namespace imseq {

// A view of shared memory: a table with an entry for each key, and behind it an arena that the
// blocks lie in. Fresh memory, all zero, is an empty table. First come, first kept, never evicted.
// Any thread of any process that has the memory may call everything at any time. Since other
// processes write to the table, what it says is believed only as far as it lies inside the arena.
class KeptBlocks {
 public:
  KeptBlocks() = default;  // keeps nothing
  // The memory is lent, page-aligned, and the same for all processes, as is num_keys. Nothing more
  // is kept while the machine has less than floor_bytes available; 0: however little.
  KeptBlocks(uint8_t* memory, int64_t memory_bytes, int64_t num_keys, int64_t floor_bytes);

  // What the table takes of the memory: whole pages, of which only used ones are ever touched.
  static int64_t table_bytes(int64_t num_keys);

  // A block that is there.
  bool find(int64_t key, const uint8_t** bytes, int64_t* size_bytes) const;
  // Takes room for a block that the caller is about to read, and then must publish or give up.
  // Page-aligned memory, or nullptr: don't keep it (it is there already, a living process is reading
  // it, the arena is full, or the machine short of memory).
  uint8_t* claim(int64_t key, int64_t room_bytes);
  // The claimed room now has the block, at bytes.
  void publish(int64_t key, const uint8_t* bytes, int64_t size_bytes);
  // Reading failed. Who claims the key next gets the same room.
  void give_up(int64_t key);
  // What is there is damaged: it will not be found again, and not kept again either, as others may
  // still read it.
  void discard(int64_t key);

  int64_t used_bytes() const;
  int64_t capacity_bytes() const { return arena_bytes_; }
  // How many are there.
  int64_t num_blocks() const;

 private:
  struct Header;
  struct Entry;
  struct Room {
    int64_t offset = 0;  // in the arena
    int64_t size_bytes = 0;
  };

  Header& header() const;
  Entry* entry(int64_t key) const;
  bool room_of(const Entry& entry, Room* room) const;
  bool take_room(int64_t size_bytes, Room* room);
  bool is_memory_short() const;

  uint8_t* memory_ = nullptr;
  uint8_t* arena_ = nullptr;
  int64_t arena_bytes_ = 0;
  int64_t num_keys_ = 0;
  int64_t floor_bytes_ = 0;
};

}  // namespace imseq
