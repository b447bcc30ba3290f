// Blocks that stay in memory from epoch to epoch, shared by the processes of a machine.
#pragma once

#include <cstdint>

namespace imseq {

// A view of shared memory: a table with an entry for each key, then an arena with the blocks.
// Memory that is all zero is an empty table. The first blocks that come are kept, and never
// evicted. Every function may be called by any thread of any process that maps the memory. As other
// processes write to the table, everything read from it is checked to lie inside the arena.
class KeptBlocks {
 public:
  KeptBlocks() = default;  // keeps nothing
  // The memory is page-aligned, the caller's, and the same for all processes, as is num_keys.
  // Nothing more is kept while the machine has less than floor_bytes available.
  KeptBlocks(uint8_t* memory, int64_t memory_bytes, int64_t num_keys, int64_t floor_bytes);

  // The size of the table: whole pages, of which only used ones are touched.
  static int64_t table_bytes(int64_t num_keys);

  // Finds a block that was published.
  bool find(int64_t key, const uint8_t** bytes, int64_t* size_bytes) const;
  // Takes room for a block that the caller will read and then must publish or give up. Returns
  // page-aligned memory, or nullptr: don't keep the block, because it is there already, a living
  // process is reading it, the arena is full, or the machine is short of memory.
  uint8_t* claim(int64_t key, int64_t room_bytes);
  // The block lies in the claimed room, at bytes.
  void publish(int64_t key, const uint8_t* bytes, int64_t size_bytes);
  // Reading failed. The next to claim the key gets the same room.
  void give_up(int64_t key);
  // The block is damaged: it will not be found again, nor replaced, as others may still read it.
  void discard(int64_t key);

  int64_t used_bytes() const;
  int64_t capacity_bytes() const { return arena_bytes_; }
  // How many blocks are published.
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
  bool change_state(int64_t key, int32_t from, int32_t to);

  uint8_t* memory_ = nullptr;
  uint8_t* arena_ = nullptr;
  int64_t arena_bytes_ = 0;
  int64_t num_keys_ = 0;
  int64_t floor_bytes_ = 0;
};

}  // namespace imseq
