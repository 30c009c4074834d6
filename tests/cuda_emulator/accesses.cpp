// What is checked and reported. The kernels are compiled with -fsanitize=thread, but nothing is linked to libtsan: the
// calls that the compiler puts at each load and store come here, and every one is checked against the registered
// buffers (bounds, gaps between rows, alignment, constness, reads of what nobody wrote) and against the
// accesses of other threads that no barrier orders before it.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace emu {

std::string format(const char* text, ...) {
  char line[512];
  va_list list;
  va_start(list, text);
  vsnprintf(line, sizeof(line), text, list);
  va_end(list);
  return line;
}

namespace {

uintptr_t place_of(const void* pc) {  // as addr2line wants it
  Dl_info info;
  return pc && dladdr(pc, &info) ? reinterpret_cast<uintptr_t>(pc) - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase)
                                 : 0;
}

}  // namespace

void report(const std::string& kind, const void* pc, const std::string& details) {
  violations.emplace(std::pair(kind, place_of(pc)), details);
}

Cell* new_cells(size_t count) {
  void* p =
      mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) abort();
  return static_cast<Cell*>(p);
}

namespace {

// ---- the check of one access ----

bool ordered(const Stamp& stamp, uint32_t thread) {
  if (stamp.thread == ~0u || stamp.thread == thread) return true;
  const uint32_t theirs = stamp.thread / block_threads, mine = thread / block_threads;
  if (theirs == mine) return stamp.block_epoch < blocks[current->block].epoch;
  if (theirs / cluster_size == mine / cluster_size) return stamp.cluster_epoch < cluster_epoch;
  return false;
}

void touch(Cell& cell, uint32_t owner, bool initialised, Kind kind, const void* pc, const char* name, int64_t at,
           bool in_buffer) {
  const uint32_t thread = blocks[current->block].linear * block_threads + current->thread;
  if (cell.owner != owner) {
    const bool keep = in_buffer && cell.written;  // what an earlier launch wrote; shared memory starts afresh
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
              static_cast<int64_t>(o * 2 - variable.offset), false);
      }
      return;
    }
    report("out of bounds", pc, format("shared memory, %zu bytes at %zu", size, offset));
    stop();
  }
  for (const Buffer& buffer : buffers) {
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
    for (int64_t e = first; e <= last; ++e) {
      touch(buffer.cells[e], launch_number, buffer.initialised, kind, pc, buffer.name.c_str(), e, true);
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

}  // namespace

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
  emu::aborted = false;
  emu::order = order;
  emu::preempt = preempt;
  emu::generator.seed(seed + 1);
}

// How many blocks a cluster has room for.
void emu_largest_cluster(unsigned blocks) { emu::largest_cluster = blocks; }

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
                          initialised != 0, emu::new_cells(elements), elements * element});
}

// A line for each violation: its kind, place for addr2line, details.
const char* emu_report() {
  static std::string all;
  all.clear();
  for (const auto& [key, details] : emu::violations) {
    const auto place = static_cast<unsigned long>(key.second);
    all += emu::format("%s\t%#lx\t", key.first.c_str(), place) + details + "\n";
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
