// The thread team: threads of the library's own, which take pieces of work as they become free and block while there are none.
//
// A machine is shared: any thread may lose its processor for milliseconds in the middle of a piece. So work is cut into pieces
// of a fraction of a millisecond that any thread may take; the calling thread takes pieces as well, and waits for no thread that
// has not begun one. Whoever waits polls for some microseconds, then blocks, which leaves its processor to the thread that it
// waits for: the scheduler moves a thread that is ready to run to a processor that becomes idle, but not to one that polls.
//
// A job is handed out through one 64-bit word, `tickets`: the job's number, and the next piece of it that is free. A thread
// takes a piece by raising the word, which fails if the job has changed; only then are the job's other fields sure to be this
// job's. They are not rewritten before all pieces that were taken are done, nor before `tickets` is closed: a thread that is late
// could otherwise take the new job's fields for those of the old one, whose word is still there.
//
// The STL is allowed here and in dispatch.cpp, which are compiled for the oldest CPU, as it is not in kernels (kernels.h).
#include <atomic>
#include <new>

#include "kernels.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <pthread.h>
#include <signal.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace edgetune {
namespace {

// ---- blocking ----

using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == sizeof(uint32_t), "the operating system and Meeting see a plain number");

// block_while: return at once if the word has another value, else after wake_all(word) at the latest, perhaps before.
#if defined(__linux__)
void block_while(Word& word, uint32_t value) { syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0); }
void wake_all(Word& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#elif defined(_WIN32)
SRWLOCK lock = SRWLOCK_INIT;
CONDITION_VARIABLE changed = CONDITION_VARIABLE_INIT;
void block_while(Word& word, uint32_t value) {
    AcquireSRWLockExclusive(&lock);
    if (word.load() == value) SleepConditionVariableSRW(&changed, &lock, INFINITE, 0);
    ReleaseSRWLockExclusive(&lock);
}
void wake_all(Word&) {
    AcquireSRWLockExclusive(&lock);  // whoever has seen the old value is asleep once this lock is granted
    ReleaseSRWLockExclusive(&lock);
    WakeAllConditionVariable(&changed);
}
#else
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
void block_while(Word& word, uint32_t value) {
    pthread_mutex_lock(&lock);
    if (word.load() == value) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}
void wake_all(Word&) {
    pthread_mutex_lock(&lock);  // whoever has seen the old value is asleep once this lock is granted
    pthread_mutex_unlock(&lock);
    pthread_cond_broadcast(&changed);
}
#endif

void rest() {
#if defined(_MSC_VER)
    YieldProcessor();
#elif defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Return once the word has another value: poll first, then block. sleepers: the number of threads that may be blocked on it.
void wait_for_change(Word& word, uint32_t value, Word& sleepers, int most_polls = POLLS) {
    for (int polls = 0; polls < most_polls; polls++) {
        if (word.load(std::memory_order_acquire) != value) return;
        rest();
    }
    sleepers.fetch_add(1);
    while (word.load() == value) block_while(word, value);
    sleepers.fetch_sub(1);
}

// Wake the threads that are blocked on a word that has just changed. Return true if there were any.
bool tell(Word& word, Word& sleepers) {
    if (sleepers.load() == 0) return false;
    wake_all(word);
    return true;
}

// ---- the team ----

struct Team {
    alignas(64) std::atomic<uint64_t> tickets{0};  // the job's number << 32 | the next free piece
    alignas(64) Word done{0};                      // pieces of this job that are done
    Word callers{0};                               // callers that are blocked on `done`
    alignas(64) Word job{0};                       // the job's number: idle threads wait for it to change
    Word idle{0};                                  // threads that are blocked on `job`
    std::atomic<uint32_t> pieces{0}, threads{0};   // threads: how many may work on this job, the caller included
    std::atomic<bool> once{false};                 // a thread takes one piece at most
    std::atomic<Piece> piece{nullptr};
    std::atomic<void*> argument{nullptr};
    std::atomic<bool> busy{false};  // a caller holds the team
    Word born{1};                   // threads that have begun, the caller included: each takes its number from here
    int size = 1;                   // threads that were started, the caller included; of the caller that holds the team
};
Team first_team;
constexpr uint64_t CLOSED = UINT32_MAX;  // `tickets` while a job's fields are written: no piece has this number
Team* team = &first_team;

// For tests: the longest time in microseconds for which a thread sleeps before a piece, and where two threads may cross.
Word longest_delay{0};

// Sleep one time in four, for a time that differs from call to call.
void delay() {
    const uint32_t longest = longest_delay.load(std::memory_order_relaxed);
    if (longest == 0) return;
    static Word state{1};
    uint32_t random = state.fetch_add(0x9e3779b9u);
    random = (random ^ (random >> 16)) * 0x85ebca6bu;
    random = (random ^ (random >> 13)) * 0xc2b2ae35u;
    if (random & 0x30000) return;
#if defined(_WIN32)
    Sleep((random >> 20) % longest / 1000);
#else
    const timespec time = {0, long((random >> 20) % longest) * 1000};
    nanosleep(&time, nullptr);
#endif
}

// Take pieces of job `number` until there are none. slot: this thread's number in the team. Return true if this thread has woken
// a caller that had blocked: it was late, perhaps since it shares a processor with the caller, which needs that now.
bool take_pieces(Team& t, uint32_t number, uint32_t slot) {
    for (;;) {
        uint64_t ticket = t.tickets.load(std::memory_order_acquire);
        delay();
        const Piece piece = t.piece.load(std::memory_order_relaxed);
        void* argument = t.argument.load(std::memory_order_relaxed);
        const uint32_t pieces = t.pieces.load(std::memory_order_relaxed), index = uint32_t(ticket);
        const bool once = t.once.load(std::memory_order_relaxed), joins = slot < t.threads.load(std::memory_order_relaxed);
        if (uint32_t(ticket >> 32) != number || index >= pieces || !joins) return false;
        if (!t.tickets.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
        delay();
        piece(argument, index, int(slot));
        if (t.done.fetch_add(1) + 1 == pieces) return tell(t.done, t.callers);
        if (once) return false;
    }
}

// The life of a thread of the team.
void live(Team& t) {
    const uint32_t slot = t.born.fetch_add(1);
    bool late = false;
    for (uint32_t seen = 0;;) {
        wait_for_change(t.job, seen, t.idle, late ? 0 : POLLS);
        seen = t.job.load(std::memory_order_acquire);
        late = take_pieces(t, seen, slot);
    }
}

// ---- starting threads ----

#if defined(_WIN32)
DWORD WINAPI begin(void* t) {
    live(*static_cast<Team*>(t));
    return 0;
}
bool start_thread(Team* t) {
    HANDLE thread = CreateThread(nullptr, THREAD_STACK_BYTES, begin, t, STACK_SIZE_PARAM_IS_A_RESERVATION, nullptr);
    if (thread) CloseHandle(thread);
    return thread != nullptr;
}
#else
void* begin(void* t) {
    live(*static_cast<Team*>(t));
    return nullptr;
}

// The child of a fork has none of its parent's threads. What they were doing stays undone in the old team, which is left.
void begin_anew() {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignof(Team), sizeof(Team)) == 0) team = new (memory) Team;
    else team->busy.store(true);  // for ever: every caller works alone
}

// Start a thread that no signal interrupts: Python's Ctrl-C belongs to the main thread.
bool start_thread(Team* t) {
    static const bool registered = pthread_atfork(nullptr, nullptr, begin_anew) == 0;
    if (!registered) return false;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_attr_setstacksize(&attributes, THREAD_STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const bool started = pthread_create(&thread, &attributes, begin, t) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    return started;
}
#endif

// Take hold of the team, with `threads` threads if they can be had. Return null if another caller holds it.
Team* hold(int threads) {
    Team* t = team;
    if (t->busy.exchange(true)) return nullptr;
    while (t->size < threads && start_thread(t)) t->size++;
    return t;
}

// Hand a job out to at most `threads` threads, work on it as well, return when it is done, and let go of the team.
void run_job(Team& t, uint32_t threads, uint32_t pieces, bool once, Piece piece, void* argument) {
    const uint32_t number = t.job.load(std::memory_order_relaxed) + 1;
    t.tickets.exchange(CLOSED, std::memory_order_acq_rel);
    t.piece.store(piece, std::memory_order_relaxed), t.argument.store(argument, std::memory_order_relaxed);
    t.pieces.store(pieces, std::memory_order_relaxed), t.threads.store(threads, std::memory_order_relaxed);
    t.once.store(once, std::memory_order_relaxed), t.done.store(0, std::memory_order_relaxed);
    delay();
    t.tickets.store(uint64_t(number) << 32, std::memory_order_release);
    t.job.store(number);
    tell(t.job, t.idle);
    take_pieces(t, number, 0);
    for (uint32_t done; (done = t.done.load(std::memory_order_acquire)) != pieces;) wait_for_change(t.done, done, t.callers);
    t.busy.store(false, std::memory_order_release);
}

struct Gang {
    Task task;
    void* argument;
    int count;
};

void join_gang(void* argument, int64_t index, int) {
    const Gang& gang = *static_cast<const Gang*>(argument);
    gang.task(gang.argument, int(index), gang.count);
}

}  // namespace

void share_out(int threads, int64_t pieces, Piece piece, void* argument) {
    Team* t = threads > 1 && pieces > 1 && pieces < INT32_MAX ? hold(threads) : nullptr;
    if (t) return run_job(*t, uint32_t(threads), uint32_t(pieces), false, piece, argument);
    for (int64_t index = 0; index < pieces; index++) piece(argument, index, 0);
}

void parallel(int threads, Task task, void* argument) {
    Team* t = threads > 1 ? hold(threads) : nullptr;
    if (!t) return task(argument, 0, 1);
    Gang gang = {task, argument, t->size < threads ? t->size : threads};
    run_job(*t, uint32_t(threads), uint32_t(gang.count), true, join_gang, &gang);
}

// The last thread to arrive starts a new round; the others wait for the round to change.
void meet(Meeting* meeting, int count) {
    if (count <= 1) return;
    Word &arrived = reinterpret_cast<Word&>(meeting->arrived), &round = reinterpret_cast<Word&>(meeting->round);
    Word& sleepers = reinterpret_cast<Word&>(meeting->sleepers);
    const uint32_t now = round.load(std::memory_order_acquire);
    if (arrived.fetch_add(1) + 1 != uint32_t(count)) return wait_for_change(round, now, sleepers);
    arrived.store(0, std::memory_order_relaxed);
    round.store(now + 1);
    tell(round, sleepers);
}

}  // namespace edgetune

// For tests of the library: let threads sleep up to `microseconds` before pieces and between them, at random; 0 ends it.
ET_EXPORT void et_delay(int microseconds) { edgetune::longest_delay.store(uint32_t(microseconds)); }
// For tests of the library: return the number of threads in the team, the caller included.
ET_EXPORT int et_team_size() { return edgetune::team->size; }
// For tests of the library: `share_out` of a function that ignores its first argument.
ET_EXPORT void et_share_out(int threads, int64_t pieces, edgetune::Piece piece) {
    edgetune::share_out(threads, pieces, piece, nullptr);
}
