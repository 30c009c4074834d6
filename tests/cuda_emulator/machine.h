// The state of the emulated machine, which emulate.cpp runs and accesses.cpp watches.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include "emulate.h"

namespace emu {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 4096;          // below a stack: a page that traps
constexpr size_t kArenaBytes = 320 * 1024;    // of a block's shared memory, with red zones
constexpr size_t kSharedLimit = 227 * 1024;   // of one block on sm_90
constexpr size_t kSharedDefault = 48 * 1024;  // without cudaFuncSetAttribute
constexpr size_t kRedZone = 64;
constexpr unsigned kMaxBlocks = 8;       // of a cluster
constexpr unsigned char kPoison = 0xFF;  // NaN as a float, -1 as an integer

// ---- what is reported ----

inline std::map<std::pair<std::string, uintptr_t>, std::string> violations;  // by kind and place: the first's details
inline bool aborted = false;  // as a CUDA context after a failed assertion: no launch runs any more

std::string format(const char* text, ...);
void report(const std::string& kind, const void* pc, const std::string& details);

// ---- shadow of memory ----

struct Stamp {
  uint32_t thread = ~0u, block_epoch = 0, cluster_epoch = 0;
};
struct Cell {
  uint32_t owner;  // the launch, or the block for shared memory, that all but `written` belongs to
  bool written, atomic;
  Stamp write, reads[2];
};

struct Buffer {
  std::string name;
  uintptr_t base;
  int64_t element, rows, columns, stride;
  bool writable, initialised;
  Cell* cells;
  int64_t span;
};
inline std::vector<Buffer> buffers;

Cell* new_cells(size_t count);

// ---- fibers, warps, blocks ----

enum class State : uint8_t { kReady, kWarp, kBlock, kCluster, kDone };

struct Warp {
  unsigned mask = 0, arrived = 0, exited = 0;
  uint32_t generation = 0;
  Where where;
  unsigned lanes[2] = {};  // that took part, in the last two operations
  unsigned char slots[2][32][8];
};

struct Block {
  uint3 index;
  uint32_t linear, generation, epoch = 0;
  unsigned alive = 0, waiting = 0;
  int or_value = 0, or_result = 0;
  // Cluster epochs, from 1: the last in which a thread left, and the last in which another block used the shared memory.
  uint32_t left = 0, visited = 0;
  const void* visited_at = nullptr;
  Where where;
  std::vector<Warp> warps;
};

struct Fiber {
  void* stack = nullptr;  // its lowest usable byte
#ifdef __x86_64__
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  State state = State::kDone;
  uint32_t block, thread;  // the block's rank in the cluster
  Where where;
};

inline std::vector<Fiber> fibers;
inline Block blocks[kMaxBlocks];
inline Fiber* current = nullptr;  // none on the host
inline unsigned cluster_size = 1, cluster_waiting = 0, cluster_alive = 0, block_threads = 0;
inline uint32_t cluster_epoch = 0, launch_number = 0, generations = 0;
inline Where cluster_where;
inline Config config;
inline void (*kernel_body)(const void*);
inline const unsigned char* arguments_begin;
inline const unsigned char* arguments_end;

inline int order = 0;         // 0 forward, 1 reverse, 2 random
inline unsigned preempt = 0;  // one access in so many is followed by another thread
inline size_t shared_limit = kSharedDefault;
inline std::minstd_rand generator;

// Lets other threads run until this one's state is kReady.
void wait(State state, Where where);

// Ends the launch, as a failed assertion does in CUDA; what the thread was about to do does not happen.
[[noreturn]] void stop();

// No barrier of the cluster is between an access to the block's shared memory and the end of one of its threads.
void report_left(const Block& block);

std::map<std::string, const bool*>& instances();  // of kernels: was it launched?

// ---- shared memory ----

struct SharedVariable {
  const void* key;
  size_t offset, size;
};
inline std::vector<SharedVariable> shared_variables;  // of the kernel that runs; at the same offsets in every block
inline unsigned char* arenas = nullptr;
inline Cell* arena_cells = nullptr;  // one for two bytes
inline size_t shared_used;           // bytes, without red zones
inline size_t shared_end;            // the next free offset

}  // namespace emu
