// The emulated machine. A thread of a block is a fiber; it is left only where it waits (barrier, warp
// operation, cluster barrier) and at random accesses. All blocks of a cluster are alive together,
// clusters run one after another.
//
// The kernels are compiled with -fsanitize=thread, but nothing is linked to libtsan: the calls that the
// compiler puts at each load and store come here, and every one is checked against the registered
// buffers (bounds, gaps between rows, alignment, constness, reads of what nobody wrote) and against the
// accesses of other threads that no barrier orders before it.
#include "emulate.h"

#include <dlfcn.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 4096;          // below a stack: a page that traps
constexpr size_t kArenaBytes = 320 * 1024;    // of a block's shared memory, with red zones
constexpr size_t kSharedLimit = 227 * 1024;   // of one block on sm_90
constexpr size_t kSharedDefault = 48 * 1024;  // without cudaFuncSetAttribute
constexpr size_t kRedZone = 64;
constexpr unsigned kMaxBlocks = 8;       // of a cluster
constexpr unsigned char kPoison = 0xFF;  // NaN as a float, -1 as an integer

// ---- what is reported ----

struct Violation {
  std::string what;  // the first one's details
  int64_t count = 0;
};
std::map<std::pair<std::string, uintptr_t>, Violation> violations;  // by kind and place
std::vector<std::string> launches;
bool aborted = false;  // as a CUDA context after a failed assertion: no launch runs any more

std::string format(const char* text, ...) {
  char line[512];
  va_list list;
  va_start(list, text);
  vsnprintf(line, sizeof(line), text, list);
  va_end(list);
  return line;
}

uintptr_t place_of(const void* pc) {  // as addr2line wants it
  Dl_info info;
  return pc && dladdr(pc, &info) ? reinterpret_cast<uintptr_t>(pc) - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase)
                                 : 0;
}

void report(const std::string& kind, const void* pc, const std::string& details) {
  Violation& violation = violations[{kind, place_of(pc)}];
  if (!violation.count++) violation.what = details;
}

// ---- shadow of memory ----

struct Stamp {
  uint32_t thread = ~0u, block_epoch = 0, cluster_epoch = 0;
};
struct Cell {
  uint32_t owner;  // the launch, or the block for shared memory, that all but `written` belongs to
  bool written, atomic, seen_read, seen_write;
  Stamp write, reads[2];
};

struct Buffer {
  std::string name;
  uintptr_t base;
  int64_t element, rows, columns, stride;
  bool writable, initialised;
  Cell* cells;
  int64_t span, read_bytes, write_bytes, read_cells, write_cells, accesses;
};
std::vector<Buffer> buffers;

Cell* new_cells(size_t count) {
  void* p =
      mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) abort();
  return static_cast<Cell*>(p);
}

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

std::vector<Fiber> fibers;
Block blocks[kMaxBlocks];
Fiber* current = nullptr;  // none on the host
unsigned cluster_size = 1, cluster_waiting = 0, cluster_alive = 0, block_threads = 0;
uint32_t cluster_epoch = 0, launch_number = 0, generations = 0;
Where cluster_where;
Config config;
void (*kernel_body)(const void*);
const unsigned char* arguments_begin;
const unsigned char* arguments_end;

int order = 0;         // 0 forward, 1 reverse, 2 random
unsigned preempt = 0;  // one access in so many is followed by another thread
size_t shared_limit = kSharedDefault;
std::minstd_rand generator;

#ifdef __x86_64__
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");
void* scheduler_sp;
void to_scheduler() { emu_switch(&current->sp, scheduler_sp); }
void to_fiber() { emu_switch(&scheduler_sp, current->sp); }
#else
ucontext_t scheduler_context;
void to_scheduler() { swapcontext(&current->context, &scheduler_context); }
void to_fiber() { swapcontext(&scheduler_context, &current->context); }
#endif

void wake(State state, unsigned block, unsigned first, unsigned count) {
  for (unsigned n = first; n < first + count; ++n) {
    Fiber& fiber = fibers[block * block_threads + n];
    if (fiber.state == state) fiber.state = State::kReady;
  }
}

// Ends the launch, as a failed assertion does in CUDA; what the thread was about to do does not happen.
[[noreturn]] void stop() {
  aborted = true;
  for (;;) to_scheduler();
}

void wait(State state, Where where) {
  current->state = state;
  current->where = where;
  to_scheduler();
}

bool same(Where a, Where b) { return a.line() == b.line() && !strcmp(a.file_name(), b.file_name()); }
std::string text(Where where) { return format("%s:%u", where.file_name(), where.line()); }

// Threads that have left count as having arrived.
void release_warp(unsigned block, unsigned number) {
  Warp& warp = blocks[block].warps[number];
  if (!warp.arrived || ((warp.arrived | warp.exited) & warp.mask) != warp.mask) return;
  warp.lanes[warp.generation++ % 2] = warp.arrived;
  warp.arrived = 0;
  wake(State::kWarp, block, number * 32, std::min(32u, block_threads - number * 32));
}
void release_block(unsigned number) {
  Block& block = blocks[number];
  if (!block.waiting || block.waiting != block.alive) return;
  block.or_result = block.or_value;
  block.or_value = 0;
  block.waiting = 0;
  ++block.epoch;
  wake(State::kBlock, number, 0, block_threads);
}
void release_cluster() {
  if (!cluster_waiting || cluster_waiting != cluster_alive) return;
  cluster_waiting = 0;
  ++cluster_epoch;
  for (unsigned b = 0; b < cluster_size; ++b) {
    ++blocks[b].epoch;
    wake(State::kCluster, b, 0, block_threads);
  }
}

// No barrier of the cluster is between an access to the block's shared memory and the end of one of its threads.
void report_left(const Block& block) {
  report("shared", block.visited_at, format("block %u may have left", block.linear));
}

void fiber_main() {
  kernel_body(arguments_begin);
  Block& block = blocks[current->block];
  const unsigned warp = current->thread / 32;
  if (block.warps[warp].arrived >> current->thread % 32 & 1) abort();
  block.warps[warp].exited |= 1u << current->thread % 32;
  --block.alive;
  --cluster_alive;
  block.left = cluster_epoch + 1;
  if (block.visited == block.left) report_left(block);
  current->state = State::kDone;
  release_warp(current->block, warp);
  release_block(current->block);
  release_cluster();
  to_scheduler();
  abort();
}

// ---- shared memory ----

struct SharedVariable {
  const void* key;
  size_t offset, size;
};
std::vector<SharedVariable> shared_variables;  // of the kernel that runs; at the same offsets in every block
unsigned char* arenas = nullptr;
Cell* arena_cells = nullptr;  // one for two bytes
size_t shared_used;           // bytes, without red zones
size_t shared_end;            // the next free offset

unsigned char* arena(unsigned block) { return arenas + block * kArenaBytes; }

size_t add_shared(const void* key, size_t size, size_t alignment) {
  const size_t offset = (shared_end + kRedZone + alignment - 1) / alignment * alignment;
  shared_end = offset + size;
  shared_used += size;
  if (shared_end > kArenaBytes || shared_used > kSharedLimit) {
    report("launch", nullptr, "more shared memory than a block can have");
    abort();
  }
  shared_variables.push_back({key, offset, size});
  for (unsigned b = 0; b < cluster_size; ++b) memset(arena(b) + offset, kPoison, size);
  return offset;
}

// ---- running ----

void start_fiber(unsigned number, unsigned block, unsigned thread) {
  Fiber& fiber = fibers[number];
  if (!fiber.stack) {
    auto* all = static_cast<unsigned char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (all == MAP_FAILED || mprotect(all, kGuardBytes, PROT_NONE)) abort();
    fiber.stack = all + kGuardBytes;
  }
  fiber.state = State::kReady;
  fiber.block = block;
  fiber.thread = thread;
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(static_cast<unsigned char*>(fiber.stack) + kStackBytes) - 8;
  top[6] = reinterpret_cast<void*>(&fiber_main);  // above six registers
  fiber.sp = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, &fiber_main, 0);
#endif
}

void run_cluster(uint32_t number) {
  cluster_waiting = 0;
  cluster_epoch = 0;
  cluster_alive = cluster_size * block_threads;
  for (unsigned b = 0; b < cluster_size; ++b) {
    Block& block = blocks[b];
    const uint32_t linear = number * cluster_size + b;
    block.linear = linear;
    block.index = {linear % config.grid.x, linear / config.grid.x % config.grid.y,
                   linear / config.grid.x / config.grid.y};
    block.generation = ++generations;
    block.epoch = block.waiting = block.left = block.visited = 0;
    block.or_value = 0;
    block.alive = block_threads;
    block.warps.assign((block_threads + 31) / 32, Warp());
    for (const auto& variable : shared_variables) memset(arena(b) + variable.offset, kPoison, variable.size);
    for (unsigned t = 0; t < block_threads; ++t) start_fiber(b * block_threads + t, b, t);
  }
  std::vector<uint32_t> turn(cluster_alive);
  for (uint32_t n = 0; n < turn.size(); ++n) turn[n] = order == 1 ? turn.size() - 1 - n : n;
  while (cluster_alive && !aborted) {
    bool progress = false;
    if (order == 2) std::shuffle(turn.begin(), turn.end(), generator);
    for (const uint32_t n : turn) {
      if (fibers[n].state != State::kReady) continue;
      progress = true;
      current = &fibers[n];
      const unsigned t = current->thread, x = config.block.x, y = config.block.y;
      threadIdx = {t % x, t / x % y, t / x / y};
      blockIdx = blocks[current->block].index;
      to_fiber();
      current = nullptr;
      if (aborted) return;
    }
    if (!progress) {
      std::string who;
      int shown = 0;
      for (const Fiber& fiber : fibers) {
        if (fiber.state == State::kDone || shown++ >= 3) continue;
        who +=
            format(" [block %u thread %u at %s]", blocks[fiber.block].linear, fiber.thread, text(fiber.where).c_str());
      }
      report("deadlock", nullptr, format("%u threads wait for ever:", cluster_alive) + who);
      aborted = true;
    }
  }
}

// ---- the check of one access ----

bool ordered(const Stamp& stamp, uint32_t thread) {
  if (stamp.thread == ~0u || stamp.thread == thread) return true;
  const uint32_t theirs = stamp.thread / block_threads, mine = thread / block_threads;
  if (theirs == mine) return stamp.block_epoch < blocks[current->block].epoch;
  if (theirs / cluster_size == mine / cluster_size) return stamp.cluster_epoch < cluster_epoch;
  return false;
}

void touch(Cell& cell, uint32_t owner, bool initialised, Kind kind, const void* pc, const char* name, int64_t at,
           Buffer* buffer) {
  const uint32_t thread = blocks[current->block].linear * block_threads + current->thread;
  if (cell.owner != owner) {
    const bool keep = buffer && cell.written;  // what an earlier launch wrote; shared memory starts afresh
    cell = Cell();
    cell.written = keep;
    cell.owner = owner;
  }
  const auto who = [&](const char* what) {
    return format("%s[%ld] by block %u thread %u%s", name, static_cast<long>(at), thread / block_threads,
                  thread % block_threads, what);
  };
  const auto clash = [&](const char* kind_of_race, const Stamp& other) {
    report(
        "race", pc,
        who(format(", %s block %u thread %u", kind_of_race, other.thread / block_threads, other.thread % block_threads)
                .c_str()));
  };
  const bool writes = kind != Kind::kRead, reads = kind != Kind::kWrite;
  if (buffer) {
    buffer->read_cells += reads && !cell.seen_read;
    buffer->write_cells += writes && !cell.seen_write;
    cell.seen_read |= reads;
    cell.seen_write |= writes;
  }
  if (reads && !cell.written && !initialised) report("uninitialised", pc, who(""));
  if (!ordered(cell.write, thread) && !(kind == Kind::kAtomic && cell.atomic)) {
    clash(writes ? "written before by" : "a value written by", cell.write);
  }
  const Stamp now{thread, blocks[current->block].epoch, cluster_epoch};
  if (writes) {
    for (const Stamp& read : cell.reads) {
      if (!ordered(read, thread) && !(kind == Kind::kAtomic && cell.atomic)) clash("read before by", read);
    }
    cell.write = now;
    cell.written = true;
    cell.atomic = kind == Kind::kAtomic;
    cell.reads[0] = cell.reads[1] = Stamp();
  } else {
    Stamp& slot = cell.reads[0].thread == thread   ? cell.reads[0]
                  : cell.reads[1].thread == thread ? cell.reads[1]
                  : ordered(cell.reads[0], thread) ? cell.reads[0]
                                                   : cell.reads[1];
    slot = now;
  }
}

void check(uintptr_t at, size_t size, Kind kind, const void* pc) {
  const auto stack = reinterpret_cast<uintptr_t>(current->stack);
  if (at - stack < kStackBytes) return;
  if (at % size && (size & (size - 1)) == 0) report("misaligned", pc, format("%zu bytes at %#lx", size, at));
  const uintptr_t in_arenas = at - reinterpret_cast<uintptr_t>(arenas);
  if (in_arenas < kMaxBlocks * kArenaBytes) {
    const unsigned block = in_arenas / kArenaBytes;
    const size_t offset = in_arenas % kArenaBytes;
    if (block >= cluster_size || !blocks[block].alive) {
      report("shared", pc, "the shared memory of a block that has left");
      stop();
    }
    if (block != current->block) {
      blocks[block].visited = cluster_epoch + 1;
      blocks[block].visited_at = pc;
      if (blocks[block].left == blocks[block].visited) report_left(blocks[block]);
    }
    for (const auto& variable : shared_variables) {
      if (offset < variable.offset || offset >= variable.offset + variable.size) continue;
      if (offset + size > variable.offset + variable.size) break;
      for (size_t o = offset / 2; o <= (offset + size - 1) / 2; ++o) {
        touch(arena_cells[block * kArenaBytes / 2 + o], blocks[block].generation, false, kind, pc, "shared",
              static_cast<int64_t>(o * 2 - variable.offset), nullptr);
      }
      return;
    }
    report("out of bounds", pc, format("shared memory, %zu bytes at %zu", size, offset));
    stop();
  }
  for (Buffer& buffer : buffers) {
    if (at < buffer.base || at + size > buffer.base + buffer.span) continue;
    const int64_t offset = at - buffer.base, first = offset / buffer.element,
                  last = (offset + static_cast<int64_t>(size) - 1) / buffer.element;
    if (buffer.stride > buffer.columns &&
        (first % buffer.stride >= buffer.columns || last % buffer.stride >= buffer.columns ||
         first / buffer.stride != last / buffer.stride)) {
      report("out of bounds", pc,
             format("%s: elements %ld to %ld, between rows", buffer.name.c_str(), static_cast<long>(first),
                    static_cast<long>(last)));
      stop();
    }
    if (kind != Kind::kRead && !buffer.writable) report("constant", pc, buffer.name + " is written");
    (kind == Kind::kRead ? buffer.read_bytes : buffer.write_bytes) += size;
    ++buffer.accesses;
    for (int64_t e = first; e <= last; ++e) {
      touch(buffer.cells[e], launch_number, buffer.initialised, kind, pc, buffer.name.c_str(), e, &buffer);
    }
    return;
  }
  if (kind == Kind::kRead && at >= reinterpret_cast<uintptr_t>(arguments_begin) &&
      at + size <= reinterpret_cast<uintptr_t>(arguments_end)) {
    return;
  }
  for (const void* builtin : {static_cast<void*>(&threadIdx), static_cast<void*>(&blockIdx),
                              static_cast<void*>(&blockDim), static_cast<void*>(&gridDim)}) {
    if (kind == Kind::kRead && at - reinterpret_cast<uintptr_t>(builtin) < sizeof(dim3)) return;
  }
  std::string near = "no buffer is near";
  for (const Buffer& buffer : buffers) {
    const auto distance = static_cast<int64_t>(at - buffer.base);
    if (distance > -65536 && distance < buffer.span + 65536) {
      near = format("byte %ld of %s, which has %ld", static_cast<long>(distance), buffer.name.c_str(),
                    static_cast<long>(buffer.span));
    }
  }
  report("out of bounds", pc,
         format("%s %zu bytes at %#lx: ", kind == Kind::kRead ? "reads" : "writes", size, at) + near);
  stop();
}

// Made when first used: instances are added while the library is loaded, in any order.
std::map<std::string, const bool*>& instances() {
  static std::map<std::string, const bool*> all;
  return all;
}

}  // namespace

bool add_instance(const char* kernel, const bool* launched) { return instances().emplace(kernel, launched).second; }

void access(const void* address, size_t size, Kind kind, const void* pc) {
  if (!current) return;
  if (preempt && generator() % preempt == 0) wait(State::kReady, Where::current());
  check(reinterpret_cast<uintptr_t>(address), size, kind, pc);
}

void store_16(void* at, unsigned x, unsigned y, unsigned z, unsigned w, const void* pc) {
  access(at, 16, Kind::kWrite, pc);
  const uint4 all{x, y, z, w};
  memcpy(at, &all, 16);
}

void fail(const char* what, Where where) {
  report(
      "assertion", nullptr,
      format("%s (%s), block %u thread %u", what, text(where).c_str(), blocks[current->block].linear, current->thread));
  stop();
}

int block_barrier_or(int predicate, Where where) {
  Block& block = blocks[current->block];
  if (block.waiting && !same(block.where, where)) {
    report("barrier", nullptr, "threads of a block wait at " + text(block.where) + " and at " + text(where));
  }
  block.where = where;
  block.or_value |= predicate != 0;
  ++block.waiting;
  current->state = State::kBlock;
  release_block(current->block);
  if (current->state == State::kBlock || preempt) wait(current->state, where);
  return block.or_result;
}
void block_barrier(Where where) { block_barrier_or(0, where); }

void cluster_barrier(Where where) {
  if (cluster_waiting && !same(cluster_where, where)) {
    report("barrier", nullptr, "threads of a cluster wait at " + text(cluster_where) + " and at " + text(where));
  }
  cluster_where = where;
  ++cluster_waiting;
  current->state = State::kCluster;
  release_cluster();
  if (current->state == State::kCluster) wait(State::kCluster, where);
}
unsigned cluster_blocks() { return cluster_size; }
unsigned cluster_rank() { return current->block; }

namespace {

// Returns the slots of the operation, whose lanes all have arrived.
const Warp& exchange(unsigned mask, const void* value, size_t size, Where where, unsigned& parity) {
  const unsigned number = current->thread / 32, lane = current->thread % 32;
  Warp& warp = blocks[current->block].warps[number];
  if (!(mask >> lane & 1)) fail("a lane is not in its own mask", where);
  if (warp.arrived && (warp.mask != mask || !same(warp.where, where))) {
    fail(
        ("lanes of a warp meet at different places or with different masks: " + text(warp.where) + " and here").c_str(),
        where);
  }
  warp.mask = mask;
  warp.where = where;
  parity = warp.generation % 2;
  memcpy(warp.slots[parity][lane], value, size);
  warp.arrived |= 1u << lane;
  current->state = State::kWarp;
  release_warp(current->block, number);
  if (current->state == State::kWarp) wait(State::kWarp, where);
  return warp;
}

}  // namespace

void shuffle(unsigned mask, void* value, size_t size, unsigned from, Where where) {
  unsigned parity;
  const Warp& warp = exchange(mask, value, size, where, parity);
  if (!(warp.lanes[parity] >> from & 1)) fail("a shuffle reads a lane that does not take part", where);
  memcpy(value, warp.slots[parity][from], size);
}

unsigned ballot(unsigned mask, int predicate, Where where) {
  const unsigned char mine = predicate != 0;
  unsigned parity, votes = 0;
  const Warp& warp = exchange(mask, &mine, 1, where, parity);
  for (unsigned n = 0; n < 32; ++n) votes |= (warp.lanes[parity] >> n & 1 & warp.slots[parity][n][0]) << n;
  return votes;
}

void* static_shared(const void* key, size_t size, size_t alignment) {
  for (const auto& variable : shared_variables) {
    if (variable.key == key) return arena(current->block) + variable.offset;
  }
  return arena(current->block) + add_shared(key, size, alignment);
}
void* dynamic_shared() { return arena(current->block) + shared_variables[0].offset; }

void* remote_shared(const void* own, unsigned rank, Where where) {
  if (rank >= cluster_size) fail("map_shared_rank of a block that the cluster does not have", where);
  const auto offset = static_cast<const unsigned char*>(own) - arena(current->block);
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(kArenaBytes))
    fail("map_shared_rank of no shared memory", where);
  return arena(rank) + offset;
}

void set_shared_limit(size_t bytes) {
  if (bytes > kSharedLimit) report("launch", nullptr, format("cudaFuncSetAttribute asks for %zu bytes", bytes));
  shared_limit = std::max(bytes, kSharedDefault);
}

void launch(const char* kernel, const Config& wanted, void (*body)(const void*), const void* arguments, size_t size) {
  const dim3 grid = wanted.grid, block = wanted.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  launches.push_back(format("%s grid %u,%u,%u block %u,%u,%u shared %zu cluster %u", kernel, grid.x, grid.y, grid.z,
                            block.x, block.y, block.z, wanted.shared, wanted.cluster));
  const bool right = grid.x >= 1 && grid.x <= 0x7FFFFFFFu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
                     grid.z <= 65535 && threads >= 1 && threads <= 1024 && wanted.shared <= shared_limit &&
                     wanted.cluster >= 1 && wanted.cluster <= kMaxBlocks && grid.x % wanted.cluster == 0;
  shared_limit = kSharedDefault;
  if (!right) report("launch", nullptr, "CUDA would refuse: " + launches.back());
  if (!right || aborted) return;

  config = wanted;
  kernel_body = body;
  cluster_size = config.cluster;
  block_threads = threads;
  arguments_begin = static_cast<const unsigned char*>(arguments);
  arguments_end = arguments_begin + size;
  ++launch_number;
  gridDim = config.grid;
  blockDim = config.block;
  if (!arenas) {
    arenas = static_cast<unsigned char*>(mmap(nullptr, kMaxBlocks * kArenaBytes, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    arena_cells = new_cells(kMaxBlocks * kArenaBytes / 2);
    fibers.reserve(kMaxBlocks * 1024);
  }
  if (fibers.size() < cluster_size * threads) fibers.resize(cluster_size * threads);
  for (Fiber& fiber : fibers) fiber.state = State::kDone;
  shared_variables.clear();
  shared_used = shared_end = 0;
  add_shared(nullptr, config.shared, 1024);

  const uint32_t clusters = static_cast<uint32_t>(uint64_t{grid.x} * grid.y * grid.z / cluster_size);
  std::vector<uint32_t> turn;
  if (order == 2) {
    turn.resize(clusters);
    for (uint32_t n = 0; n < clusters; ++n) turn[n] = n;
    std::shuffle(turn.begin(), turn.end(), generator);
  }
  for (uint32_t n = 0; n < clusters && !aborted; ++n) {
    run_cluster(order == 2 ? turn[n] : order == 1 ? clusters - 1 - n : n);
  }
}

}  // namespace emu

// ---- what the driver calls ----

extern "C" {

// Forgets buffers and reports. order: 0 forward, 1 reverse, 2 random; preempt: see above.
void emu_begin(int order, uint64_t seed, unsigned preempt) {
  for (auto& buffer : emu::buffers) {
    munmap(buffer.cells, buffer.span / buffer.element * sizeof(emu::Cell));
  }
  emu::buffers.clear();
  emu::violations.clear();
  emu::launches.clear();
  emu::aborted = false;
  emu::order = order;
  emu::preempt = preempt;
  emu::generator.seed(seed + 1);
}

// Gives the stacks back: a process has room for those of a few libraries only.
void emu_end() {
  for (const auto& fiber : emu::fibers) {
    if (fiber.stack)
      munmap(static_cast<unsigned char*>(fiber.stack) - emu::kGuardBytes, emu::kGuardBytes + emu::kStackBytes);
  }
  emu::fibers.clear();
}

// Only what is registered may be touched: rows of `columns` elements that begin `stride` elements apart.
void emu_buffer(const char* name, void* base, int64_t element, int64_t rows, int64_t columns, int64_t stride,
                int writable, int initialised) {
  const int64_t elements = rows && columns ? (rows - 1) * stride + columns : 0;
  if (!elements) return;
  emu::buffers.push_back({name, reinterpret_cast<uintptr_t>(base), element, rows, columns, stride, writable != 0,
                          initialised != 0, emu::new_cells(elements), elements * element, 0, 0, 0, 0, 0});
}

// One line each: "violation" kind, count, place for addr2line, details; "launch"; "buffer" name, bytes
// read, bytes written, of how many elements they are, and in how many accesses.
const char* emu_report() {
  static std::string all;
  all.clear();
  for (const auto& [key, violation] : emu::violations) {
    all += emu::format("violation\t%s\t%ld\t%#lx\t", key.first.c_str(), static_cast<long>(violation.count),
                       static_cast<unsigned long>(key.second)) +
           violation.what + "\n";
  }
  for (const auto& launch : emu::launches) all += "launch\t" + launch + "\n";
  for (const auto& b : emu::buffers) {
    all += emu::format("buffer\t%s\t%ld\t%ld\t%ld\t%ld\t%ld\n", b.name.c_str(), static_cast<long>(b.read_bytes),
                       static_cast<long>(b.write_bytes), static_cast<long>(b.read_cells),
                       static_cast<long>(b.write_cells), static_cast<long>(b.accesses));
  }
  return all.c_str();
}

// A line for each instance of a kernel: whether any launch so far was of it, and its name.
const char* emu_instances() {
  static std::string all;
  all.clear();
  for (const auto& [kernel, launched] : emu::instances()) all += (*launched ? "1\t" : "0\t") + kernel + "\n";
  return all.c_str();
}

#define EMU_HOOK(size)                                                                                     \
  void __tsan_read##size(void* p) { emu::access(p, size, emu::Kind::kRead, __builtin_return_address(0)); } \
  void __tsan_write##size(void* p) { emu::access(p, size, emu::Kind::kWrite, __builtin_return_address(0)); }
EMU_HOOK(1)
EMU_HOOK(2)
EMU_HOOK(4)
EMU_HOOK(8)
EMU_HOOK(16)
#undef EMU_HOOK
void __tsan_read_range(void* p, size_t size) { emu::access(p, size, emu::Kind::kRead, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { emu::access(p, size, emu::Kind::kWrite, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Likewise -fsanitize=undefined: every handler's first argument begins with the place in the source.
struct EmuPlace {
  const char* file;
  uint32_t line, column;
};
#define EMU_UNDEFINED(name)                                                                                  \
  void __ubsan_handle_##name(const EmuPlace* at) {                                                           \
    emu::report("undefined: " #name, __builtin_return_address(0), emu::format("%s:%u", at->file, at->line)); \
  }
EMU_UNDEFINED(add_overflow)
EMU_UNDEFINED(sub_overflow)
EMU_UNDEFINED(mul_overflow)
EMU_UNDEFINED(negate_overflow)
EMU_UNDEFINED(divrem_overflow)
EMU_UNDEFINED(shift_out_of_bounds)
EMU_UNDEFINED(out_of_bounds)
EMU_UNDEFINED(pointer_overflow)
EMU_UNDEFINED(type_mismatch_v1)  // null or misaligned
EMU_UNDEFINED(load_invalid_value)
EMU_UNDEFINED(float_cast_overflow)
EMU_UNDEFINED(nonnull_arg)
EMU_UNDEFINED(invalid_builtin)
EMU_UNDEFINED(missing_return)
EMU_UNDEFINED(builtin_unreachable)
#undef EMU_UNDEFINED

}  // extern "C"
