// What emulated threads may not do to memory: reach outside registered tensors and their block's shared memory, read
// what nobody wrote, or touch what another thread touches without an order between the two.
//
// Happens-before with vector clocks. A thread's clock grows at each point where others may have learnt of its accesses.
// What it knows of others is a `Knowledge`: for each block it has heard of, the clock of every thread there. Threads
// that met at a barrier share one. Every unit of memory remembers its last write and the reads since; an access by a
// thread that does not know of a conflicting one is a race, whatever the schedule was.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace fused_ops::emulation {

using Where = std::source_location;
struct Block;
struct Shape;
struct Thread;

// A counted reference; everything here runs on one OS thread.
template <typename T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(T* object) : object_(object) { ++object_->references; }
  Ref(const Ref& other) : object_(other.object_) { if (object_) ++object_->references; }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept { return std::swap(object_, other.object_), *this; }
  ~Ref() { if (object_ && --object_->references == 0) delete object_; }
  T* operator->() const { return object_; }
  T& operator*() const { return *object_; }
  T* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }
  bool operator==(const Ref& other) const { return object_ == other.object_; }

 private:
  T* object_ = nullptr;
};

struct Clocks {
  std::vector<uint32_t> of;  // by thread of the block, then its copies by mbarrier
  int references = 0;
};

class Knowledge {
 public:
  struct Entry {
    uint32_t block;
    Ref<Clocks> clocks;
  };
  std::vector<Entry> entries;  // by block
  int references = 0;
  const Clocks* find(uint32_t block) const;
};

enum class Scope : uint8_t { block, cluster, device, system };

namespace check {

void start_launch(const Shape& shape, const void* arguments, size_t bytes);
void end_launch();
void start_block(Block& block);
void end_block(Block& block);
void add_shared(Block& block, size_t at, size_t bytes);

// Tensors that device code may touch. `element`: the size of what one thread writes at a time.
void add_range(const void* start, size_t bytes, size_t element, bool writable);
size_t ranges();
void drop_ranges_to(size_t count);

enum class Kind : uint8_t { read, write, atomic, look };  // look: a read that is not remembered
// An access by instrumented code, which returns to `pc`; or by a wrapper on behalf of the running thread.
void access(const void* address, size_t bytes, Kind kind, const void* pc);
void access(const void* address, size_t bytes, Kind kind, const Where& where);
inline void read(const void* address, size_t bytes, const Where& where) { access(address, bytes, Kind::read, where); }
inline void write(void* address, size_t bytes, const Where& where) { access(address, bytes, Kind::write, where); }

// Whose accesses an asynchronous copy's are, once it is complete: not its thread's, but known to whoever acquires from
// its mbarrier, or waits for its wgmma. Of block `block`, at most 64 (`slot`).
struct Copier {
  uint32_t block = 0, slot = 0, clock = 1;
};

// An asynchronous write to memory: from `begin_write` on nobody may touch it; `end_write` makes it the running
// thread's write (or `by`'s). `begin_async_write`: through the async proxy (PTX ISA, "Async proxy"), which must have been
// shown by proxy fences what others wrote there.
void begin_write(void* address, size_t bytes, const Where& where);
void begin_async_write(void* address, size_t bytes, const Where& where);
void end_write(void* address, size_t bytes, const Where& where, const Copier* by = nullptr);
// An asynchronous read through the async proxy: until `end_read` nobody may write there.
void begin_async_read(const void* address, size_t bytes, const Where& where);
void end_read(const void* address, size_t bytes, const Where& where, const Copier* by = nullptr);

// Order between two threads through an object that is neither memory nor a barrier (an mbarrier, say).
struct Signal {
  struct Part {
    Ref<Knowledge> knowledge, shown;  // `shown`: to asynchronous copies
    Scope scope;
    uint32_t block, cluster;
  };
  std::vector<Part> parts;
};
// Everybody's accesses so far, and what `announced` passes on, become known to everybody; null entries are skipped.
void meet(std::span<Thread* const> threads, const Signal* announced = nullptr);

void release(Signal& signal, Scope scope = Scope::device);
void release(Signal& signal, const Block& block, Copier& copier);  // at an mbarrier of `block`
void acquire(const Signal& signal, Scope scope = Scope::device);

// PTX ISA, Memory Consistency Model: a fence orders this thread's accesses with its atomics, for whom `scope` covers.
void fence(Scope scope);
// An atomic access to `address`, which an order may pass through: `acquires`, `releases` or (relaxed) neither.
void atomic(void* address, size_t bytes, bool reads, bool writes, bool acquires, bool releases, Scope scope,
            const Where& where);

// This thread's writes become visible to the async proxy, of others after an order between the two (PTX ISA,
// fence.proxy.async). The ISA allows the fence anywhere between a write and the copy; here each writing thread fences.
void proxy_fence();

// Touches to accumulators and fragments that a wgmma has in flight, or since this thread's last wgmma_fence.
struct Registers;
void touch_registers(Registers& registers, uintptr_t first, uintptr_t last, bool write, std::string (*line)(uint32_t),
                     uint32_t site);

}  // namespace check
}  // namespace fused_ops::emulation
