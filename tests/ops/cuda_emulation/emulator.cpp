// The threads of a block are contexts of their own, which switch only where they wait.
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <utility>

#include "../../../csrc/cuda/launchers.h"
#include "cuda_runtime.h"

namespace osf::cuda {

// The least that an architecture since sm_80 gives a block; nobody may touch the guard.
constexpr size_t kMaxShared = 99 << 10, kGuard = 64;
alignas(128) thread_local unsigned char dynamic_shared[kMaxShared + kGuard];

}  // namespace osf::cuda

extern "C" {

// Present in the thread sanitizer, which sees races within a block; this file is built without it.
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_release(void* token);
[[gnu::weak]] void __tsan_acquire(void* token);

// 1: threads from the last to the first, and two blocks instead of as many as wanted
int emulated_schedule = 0;

auto* emulated_error_text = osf::cuda::error_text;
auto* emulated_patch_rotate = osf::cuda::patch_rotate;
auto* emulated_patch_outer = osf::cuda::patch_outer;
auto* emulated_patch_outer_workspace_bytes = osf::cuda::patch_outer_workspace_bytes;
auto* emulated_skew_exp = osf::cuda::skew_exp;
auto* emulated_skew_exp_workspace_bytes = osf::cuda::skew_exp_workspace_bytes;
auto* emulated_d_skew_exp = osf::cuda::d_skew_exp;
auto* emulated_d_skew_exp_workspace_bytes = osf::cuda::d_skew_exp_workspace_bytes;
auto* emulated_rotation_step = osf::cuda::rotation_step;
auto* emulated_loss_workspace_bytes = osf::cuda::loss_workspace_bytes;
auto* emulated_latent_mse = osf::cuda::latent_mse;
auto* emulated_d_latent_mse = osf::cuda::d_latent_mse;
auto* emulated_pixel_l1 = osf::cuda::pixel_l1;
auto* emulated_d_pixel_l1 = osf::cuda::d_pixel_l1;

}  // extern "C"

namespace emulation {
namespace {

using osf::cuda::dynamic_shared;
using osf::cuda::kMaxShared;

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kDefaultShared = 48 << 10, kStackBytes = 256 << 10;

enum State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Context {
  ucontext_t first;  // where it begins
  void* place[5];    // and goes on, for __builtin_longjmp
  bool has_begun;
  void* fiber;  // of the thread sanitizer
};
struct Thread {
  State state;
  uint64_t slot;
  std::vector<Copy> copies;
  Context context;
  bool is_free;  // to run the next block: it has ended this one
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};
struct Barrier {
  char tokens[2];  // for the sanitizer; who waits next takes the other one
  int next;
};

Thread threads[kMaxThreads];
Context scheduler;
Barrier block_barrier, warp_barriers[kMaxThreads / kWarp];
char begin_token, end_token;
std::function<void()> kernel_body;
std::map<void*, size_t> allowed_shared;
const char* error;  // of the last launch

void check(bool condition, const char* otherwise) {
  if (!condition && !error) error = otherwise;
}

void announce(char* token) {
  if (__tsan_release) __tsan_release(token);
}
void learn(char* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}
// swapcontext alone would ask the system for the signal mask at every switch, most of the time.
[[gnu::noinline]] void go(Context& from, Context& to) {
  constexpr unsigned kWithoutOrder = 1;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.fiber, kWithoutOrder);
  from.has_begun = true;
  if (__builtin_setjmp(from.place)) return;
  if (to.has_begun) __builtin_longjmp(to.place, 1);
  setcontext(&to.first);
}

void leave(State state, char* token) {
  Thread& thread = threads[threadIdx.x];
  thread.state = state;
  announce(token);
  go(thread.context, scheduler);
  learn(token);
}
void enter() {
  for (;;) {
    learn(&begin_token);
    kernel_body();
    check(copies().empty(), "ends before its copies");
    copies().clear();
    threads[threadIdx.x].is_free = true;
    leave(kDone, &end_token);
  }
}
void start(Thread& thread) {
  thread.state = kReady;
  if (std::exchange(thread.is_free, false)) return;
  thread.context.has_begun = false;
  getcontext(&thread.context.first);
  thread.context.first.uc_stack.ss_sp = thread.stack.get();
  thread.context.first.uc_stack.ss_size = kStackBytes;
  makecontext(&thread.context.first, enter, 0);
  if (__tsan_create_fiber && !thread.context.fiber) thread.context.fiber = __tsan_create_fiber(0);
}

bool all(unsigned begin, unsigned end, State state) {
  return std::all_of(threads + begin, threads + end, [=](auto& t) { return t.state == state; });
}
// Lets the threads go on if all have come.
bool release(unsigned begin, unsigned end, State state, Barrier& barrier) {
  if (!all(begin, end, state)) return false;
  for (unsigned i = begin; i < end; ++i) threads[i].state = kReady;
  barrier.next = 1 - barrier.next;
  return true;
}
unsigned in_order(unsigned i, unsigned n) { return emulated_schedule == 0 ? i : n - 1 - i; }

// A warp goes as far as it gets before another runs, so that a barrier left out shows.
void run_block(unsigned count) {
  const unsigned warps = (count + kWarp - 1) / kWarp;
  std::for_each(threads, threads + count, start);
  if (__tsan_get_current_fiber) scheduler.fiber = __tsan_get_current_fiber();
  announce(&begin_token);
  do {
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned warp = in_order(w, warps), begin = warp * kWarp;
      const unsigned size = std::min(kWarp, count - begin);
      do {
        for (unsigned i = 0; i < size; ++i) {
          threadIdx.x = begin + in_order(i, size);
          Thread& thread = threads[threadIdx.x];
          if (thread.state == kReady) go(scheduler, thread.context);
        }
      } while (release(begin, begin + size, kAtWarpBarrier, warp_barriers[warp]));
    }
  } while (release(0, count, kAtBlockBarrier, block_barrier));
  learn(&end_token);
  check(all(0, count, kDone), "threads wait at different barriers");
}

// Sets all bytes of this library's shared memory to 0xff, NaN in every dtype.
int poison_shared(dl_phdr_info* library, size_t, void*) {
  auto* const memory = static_cast<unsigned char*>(library->dlpi_tls_data);
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& part = library->dlpi_phdr[i];
    if (part.p_type != PT_TLS || !memory || dynamic_shared < memory) continue;
    if (dynamic_shared < memory + part.p_memsz) std::memset(memory, 0xff, part.p_memsz);
  }
  return 0;
}

}  // namespace

void wait_for_block() { leave(kAtBlockBarrier, &block_barrier.tokens[block_barrier.next]); }
void wait_for_warp() {
  Barrier& barrier = warp_barriers[threadIdx.x / kWarp];
  leave(kAtWarpBarrier, &barrier.tokens[barrier.next]);
}
void* slot(unsigned thread) { return &threads[thread].slot; }
std::vector<Copy>& copies() { return threads[threadIdx.x].copies; }
void allow_dynamic_shared(void* kernel, int bytes) { allowed_shared[kernel] = bytes; }

const char* last_error() { return error ? error : "the launcher refuses"; }

void require(bool condition, const char* otherwise) {
  check(condition, otherwise);
  if (!condition) leave(kDone, &end_token);
}

cudaError_t launch(const cudaLaunchConfig_t& config, void* kernel, std::function<void()> body) {
  const size_t shared = config.dynamicSmemBytes;
  error = nullptr;
  check(shared <= std::max(kDefaultShared, allowed_shared[kernel]), "no leave for shared memory");
  check(shared <= kMaxShared, "too much shared memory");
  check(config.gridDim.x > 0 && config.blockDim.x - 1 < kMaxThreads, "no such grid or block");
  kernel_body = std::move(body);
  gridDim.x = emulated_schedule == 0 ? config.gridDim.x : std::min(2u, config.gridDim.x);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x && !error; ++blockIdx.x) {
    dl_iterate_phdr(poison_shared, nullptr);
    run_block(config.blockDim.x);
    const unsigned char* const rest = dynamic_shared + shared;  // equal bytes: each is the next
    check(*rest == 0xff && !std::memcmp(rest, rest + 1, std::end(dynamic_shared) - rest - 1),
          "written beyond the shared memory asked for");
  }
  return error ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulation
