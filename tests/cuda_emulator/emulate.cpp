// The emulated machine. A thread of a block is a fiber; it is left only where it waits (barrier, warp
// operation, cluster barrier) and at random accesses. All blocks of a cluster are alive together,
// clusters run one after another. What a thread reads and writes is checked in accesses.cpp.
#include "emulate.h"

#include <sys/mman.h>

#include <cstdlib>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {
namespace {

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

}  // namespace

[[noreturn]] void stop() {
  aborted = true;
  for (;;) to_scheduler();
}

void wait(State state, Where where) {
  current->state = state;
  current->where = where;
  to_scheduler();
}

void report_left(const Block& block) {
  report("shared", block.visited_at, format("block %u may have left", block.linear));
}

namespace {

void wake(State state, unsigned block, unsigned first, unsigned count) {
  for (unsigned n = first; n < first + count; ++n) {
    Fiber& fiber = fibers[block * block_threads + n];
    if (fiber.state == state) fiber.state = State::kReady;
  }
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

}  // namespace

// Made when first used: instances are added while the library is loaded, in any order.
std::map<std::string, const bool*>& instances() {
  static std::map<std::string, const bool*> all;
  return all;
}

bool add_instance(const char* kernel, const bool* launched) { return instances().emplace(kernel, launched).second; }

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
  const bool right = grid.x >= 1 && grid.x <= 0x7FFFFFFFu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
                     grid.z <= 65535 && threads >= 1 && threads <= 1024 && wanted.shared <= shared_limit &&
                     wanted.cluster >= 1 && wanted.cluster <= largest_cluster && grid.x % wanted.cluster == 0;
  shared_limit = kSharedDefault;
  if (!right) {
    report("launch", nullptr,
           format("CUDA would refuse: %s grid %u,%u,%u block %u,%u,%u shared %zu cluster %u", kernel, grid.x, grid.y,
                  grid.z, block.x, block.y, block.z, wanted.shared, wanted.cluster));
  }
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
