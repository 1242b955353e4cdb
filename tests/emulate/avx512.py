"""Runs a static x86-64 Linux program on an emulated Ice Lake: the AVX-512 kernels without a machine that has them.

The processor is Bochs's, from the Python package `bochscpu-python` (0.4.0); this file is the little of a kernel that
a test binary needs: its memory, its system calls (most are handed to the real kernel) and its threads, which take
turns at their system calls. For example, from the root of the repository:

    pip install bochscpu-python==0.4.0
    export RUSTFLAGS="-C target-feature=+crt-static"
    cargo test --target x86_64-unknown-linux-gnu -p kernels --no-run     # prints the names of the binaries
    cd crates/kernels && PROPTEST_CASES=8 python ../../tests/emulate/avx512.py BINARY --test-threads=1

`--count` before the binary's name looks at each instruction and prints those of 512 bits at the end, by opcode; it is
some thirty times slower.

An emulated program takes some two hundred times as long as on a real machine. Not part of CI.
"""

import collections
import ctypes
import errno
import os
import pathlib
import struct
import sys
import time
import traceback

try:
    import bochscpu
except ImportError as problem:  # Wheels built with glibc 2.38 on older systems.
    if "__isoc23" not in str(problem) or "AVX512_SHIM" in os.environ:
        raise
    import subprocess
    import tempfile

    shim = os.path.join(tempfile.mkdtemp(), "isoc23.so")
    source = """#include <stdio.h>\n#include <stdlib.h>\n#include <stdarg.h>
    unsigned long long __isoc23_strtoull(const char *s, char **e, int b) { return strtoull(s, e, b); }
    int __isoc23_sscanf(const char *s, const char *f, ...) {
        va_list l; va_start(l, f); int n = vsscanf(s, f, l); va_end(l); return n; }"""
    subprocess.run(["cc", "-std=gnu11", "-shared", "-fPIC", "-xc", "-", "-o", shim], input=source.encode(), check=True)
    os.environ.update(LD_PRELOAD=shim, AVX512_SHIM=shim)
    os.execv(sys.executable, [sys.executable, *sys.argv])
import bochscpu.cpu
import bochscpu.memory

MEMORY = 1 << 36  # of the guest, each address its own physical one; the host gives what is touched
PAGE = 4096
TABLES, STUB, FLAG, AREAS = 0x1000, 0x80000, 0x81000, 0x100000
PROGRAM, MAPS, STACK = 0x1000_0000, 0x1_0000_0000, MEMORY - PAGE
ENTERED, SWITCHED = 0x82000, 0x82040  # what the stub touches to call `Kernel.trap`
REGISTERS = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15".split()
# The model that the package takes, which lacks VNNI, and the one that we take.
MODELS = ["_Z23create_corei3_cnl_cpuidP8BX_CPU_C", "_Z29create_corei7_icelake_u_cpuidP8BX_CPU_C"]

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.syscall.restype = ctypes.c_long
HOST = libc.mmap(None, MEMORY, 3, 0x4022, -1, 0)  # private, anonymous, no reserve
assert HOST != ctypes.c_void_p(-1).value, "no address space"

# System calls for the real kernel: their number, and which arguments are pointers.
HOST_CALLS = {0: [1], 1: [1], 2: [0], 3: [], 4: [0, 1], 5: [1], 7: [0], 8: [], 16: [2], 17: [1], 21: [0], 28: [0],
              32: [], 39: [], 63: [0], 72: [], 79: [0], 80: [0], 87: [0], 89: [0, 1], 99: [0], 102: [], 104: [],
              107: [], 108: [], 137: [0, 1], 138: [1], 204: [2], 217: [1], 257: [1], 258: [1], 262: [1, 2], 263: [1],
              267: [1, 2], 302: [2, 3], 318: [0], 332: [1, 4]}
NOTHING = {10, 12, 13, 14, 15, 27, 131, 149, 157, 203, 273}  # brk, protection, signals: nothing is done


def use_model():
    """Makes the package's one model another: the first bytes of its maker become a jump."""
    library = ctypes.CDLL(bochscpu._bochscpu.__file__)
    base, wanted = (ctypes.cast(library[name], ctypes.c_void_p).value for name in MODELS)
    assert libc.mprotect(ctypes.c_void_p(base & -PAGE), ctypes.c_size_t(2 * PAGE), 7) == 0
    ctypes.memmove(base, b"\x48\xb8" + struct.pack("<Q", wanted) + b"\xff\xe0", 12)


def read(at, count):
    return ctypes.string_at(HOST + at, count)


def write(at, data):
    assert 0 <= at and at + len(data) <= MEMORY, hex(at)
    ctypes.memmove(HOST + at, data, len(data))


def number(at, form):
    return struct.unpack(form, read(at, struct.calcsize(form)))[0]


def up(n):
    return (n + PAGE - 1) & -PAGE


def segment(selector, attributes, limit=0xFFFFFFFF):
    segment = bochscpu.Segment()
    segment.present, segment.base, segment.limit = True, 0, limit
    segment.selector, segment.attr = selector, attributes
    return segment


class Thread:
    def __init__(self, tid, registers, fs):
        self.tid, self.registers, self.fs, self.ends_at, self.waits_on, self.until = tid, registers, fs, 0, None, None
        self.area = AREAS + PAGE * tid
        write(self.area, bytes(24) + struct.pack("<II", 0x1F80, 0xFFFF) + bytes(PAGE - 32))  # for xsave, with mxcsr


class Kernel:
    def __init__(self, path, arguments, count):
        self.path, self.count = path, count
        self.seen, self.calls, self.threads, self.code = collections.Counter(), 0, 1, None
        self.free, self.next_map, self.skew = collections.defaultdict(list), MAPS, 0
        self.session = bochscpu.Session()
        self.session.missing_page_handler = self.missing
        self.cpu = self.session.cpu
        self.tables()
        entry, self.auxiliary = self.load()
        state = bochscpu.State()
        state.cr0, state.cr3, state.cr4, state.efer, state.xcr0 = 0x80050033, TABLES, 0x50620 | 1 << 16, 0xD01, 0xE7
        state.star, state.lstar, state.sfmask = 0x23 << 48 | 0x10 << 32, STUB, 0x700
        state.rip, state.rsp, state.rflags = entry, self.stack([path, *arguments]), 2
        state.mxcsr, state.mxcsr_mask, state.fpcw, state.fptw = 0x1F80, 0xFFFF, 0x37F, 0xFFFF
        state.cs = segment(0x33, 0xA0FB)
        state.ds = state.es = state.ss = state.fs = state.gs = segment(0x2B, 0xC0F3)
        state.tr, state.ldtr = segment(0x40, 0x8B, 0x67), segment(0, 0x82, 0)
        self.cpu.state = state
        self.now, self.ready, self.waiting = Thread(1, None, 0), collections.deque(), []

    def missing(self, at):
        assert 0 < at < MEMORY, f"no memory at {at:#x}"
        bochscpu.memory.page_insert(at & -PAGE, HOST + (at & -PAGE))

    def tables(self):
        """Each address is its own physical one, in pages of 2 MiB; and the code that a system call enters."""
        write(TABLES, struct.pack("<Q", TABLES + PAGE | 7))
        for i in range(MEMORY >> 30):
            write(TABLES + PAGE + 8 * i, struct.pack("<Q", TABLES + PAGE * (i + 2) | 7))
        for i in range(MEMORY >> 21):
            write(TABLES + 2 * PAGE + 8 * i, struct.pack("<Q", i << 21 | 0x87))
        touch = lambda at: b"\x0f\x18\x04\x25" + struct.pack("<I", at)  # prefetchnta [at]
        stub = touch(ENTERED) + b"\x80\x3c\x25" + struct.pack("<I", FLAG) + b"\x00"  # cmp byte [FLAG], 0
        stub += b"\x75\x03\x48\x0f\x07"  # jne +3; sysretq
        stub += b"\x48\x0f\xae\x27\x48\x0f\xae\x2e"  # xsave64 [rdi]; xrstor64 [rsi]
        stub += b"\xf3\x48\x0f\xae\xd3" + touch(SWITCHED) + b"\x48\x0f\x07"  # wrfsbase rbx; ...; sysretq
        write(STUB, stub)

    def load(self):
        image = pathlib.Path(self.path).read_bytes()
        kind, machine, _, entry, at = struct.unpack_from("<HHIQQ", image, 16)
        size, count = struct.unpack_from("<HH", image, 54)
        assert image[:5] == b"\x7fELF\x02" and machine == 62, "not an x86-64 program"
        base = PROGRAM if kind == 3 else 0
        headers = 0
        for i in range(count):
            kind, _, offset, address, _, in_file, _, _ = struct.unpack_from("<IIQQQQQQ", image, at + i * size)
            assert kind != 3, "not a static program"
            if kind == 1:
                write(base + address, image[offset:offset + in_file])
                if offset <= at < offset + in_file:
                    headers = base + address + at - offset
        # What a kernel tells a program, by `AT_` number: headers, page, entry, users, processor, shortest signal stack.
        return base + entry, {3: headers, 4: size, 5: count, 6: PAGE, 7: 0, 8: 0, 9: base + entry, 11: 0, 12: 0,
                              13: 0, 14: 0, 23: 0, 16: 0xBFEBFBFF, 17: 100, 26: 2, 51: 3632}

    def stack(self, arguments):
        top = STACK
        def push(data):
            nonlocal top
            top -= len(data)
            write(top, data)
            return top
        strings = [[push(os.fsencode(text) + b"\0") for text in some]
                   for some in (arguments, [f"{k}={v}" for k, v in os.environ.items() if k != "LD_PRELOAD"])]
        vector = dict(self.auxiliary) | {25: push(os.urandom(16)), 31: strings[0][0], 15: push(b"x86_64\0")}
        words = [len(arguments), *strings[0], 0, *strings[1], 0]
        words += [word for pair in vector.items() for word in pair] + [0, 0]
        top = (top - 8 * len(words)) & -64
        write(top, struct.pack(f"<{len(words)}Q", *words))
        return top

    def run(self):
        hook = bochscpu.Hook()
        hook.prefetch_hint = lambda session, cpu, what, segment, at: self.trap(at)
        hook.exception = lambda session, cpu, vector, code: self.stop(
            70, f"exception {vector}, code {code}, at {self.cpu.rip:#x} (the program is at {PROGRAM:#x})")
        if self.count:
            hook.before_execution = lambda session, cpu, instruction: self.look()
        self.session.run([hook])
        return 70 if self.code is None else self.code

    def stop(self, code, why=None):
        if self.code is None and why:
            print(f"emulator: {why}", file=sys.stderr)
        self.code = code if self.code is None else self.code
        self.session.stop()

    def look(self):
        at = HOST + self.cpu.rip
        if ctypes.string_at(at, 1) == b"\x62":
            _, p0, p1, p2, opcode, form = ctypes.string_at(at, 6)
            # Between registers, with a rounding of its own, the bits of the length mean something else.
            if p2 >> 5 & 3 == 2 or p2 & 16 and form >= 0xC0:
                self.seen[p0 & 7, p1 & 3, opcode] += 1

    def trap(self, at):
        if self.code is not None or at not in (ENTERED, SWITCHED):
            return
        try:
            if at == SWITCHED:
                for name, value in self.now.registers.items():
                    setattr(self.cpu, name, value)
                return
            old, fs = self.now, self.now.fs
            result = self.call()
            if result is not None:
                self.cpu.rax = result & (1 << 64) - 1
            switch = self.now is not old or self.now.fs != fs
            write(FLAG, bytes([switch]))
            if switch and self.code is None:
                if self.now is old:
                    old.registers = self.registers()
                self.cpu.rax = self.cpu.rdx = (1 << 64) - 1
                self.cpu.rdi, self.cpu.rsi, self.cpu.rbx = old.area, self.now.area, self.now.fs
        except Exception:
            self.stop(70, traceback.format_exc())

    def registers(self, **other):
        return {name: getattr(self.cpu, name) for name in REGISTERS} | other

    # Threads.

    def time(self):
        return time.monotonic() + self.skew

    def leave(self, result, ready=False, **wait):
        """Puts the current thread aside, with what its call returns, and takes the next."""
        if result is not None:
            self.now.registers = self.registers(rax=result & (1 << 64) - 1)
            if ready:
                self.ready.append(self.now)
            else:
                self.now.waits_on, self.now.until = wait.get("on"), wait.get("until")
                self.waiting.append(self.now)
        self.expire()
        if not self.ready:
            timed = [thread.until for thread in self.waiting if thread.until is not None]
            if not timed:
                return self.stop(70, "all threads wait")
            self.skew += max(0, min(timed) - self.time())
            self.expire()
        self.now = self.ready.popleft()
        return self.now.registers["rax"]

    def expire(self):
        for thread in [t for t in self.waiting if t.until is not None and t.until <= self.time()]:
            self.waiting.remove(thread)
            if thread.waits_on is not None:
                thread.registers["rax"] = -errno.ETIMEDOUT & (1 << 64) - 1
            self.ready.append(thread)

    def wake(self, at, most):
        woken = [thread for thread in self.waiting if thread.waits_on == at][:most]
        for thread in woken:
            self.waiting.remove(thread)
            self.ready.append(thread)
        return len(woken)

    def futex(self, at, operation, value, timeout, *_):
        command = operation & 127
        if command in (0, 9):
            if number(at, "<I") != value & 0xFFFFFFFF:
                return -errno.EAGAIN
            until = number(timeout, "<q") + number(timeout + 8, "<q") / 1e9 if timeout else None
            if timeout and command == 0:
                until += self.time()
            elif timeout and operation & 256:  # by the calendar
                until += time.monotonic() - time.time()
            return self.leave(0, on=at, until=until)
        if command in (1, 10):
            woken = self.wake(at, value)
            # The woken first: so that threads do take part in each other's work.
            return self.leave(woken, ready=True) if woken else 0
        return self.wake(at, 1 << 30) if command in (3, 4) else -errno.ENOSYS

    # System calls.

    def call(self):
        cpu = self.cpu
        call, a = cpu.rax, [cpu.rdi, cpu.rsi, cpu.rdx, cpu.r10, cpu.r8, cpu.r9]
        self.calls += 1
        if call in HOST_CALLS:
            return self.host(call, a, HOST_CALLS[call])
        if call in NOTHING:
            return 0
        if call == 158 and a[0] == 0x1002:  # arch_prctl: the base of fs
            self.now.fs = a[1]
            return 0
        if call in (186, 218):  # gettid, set_tid_address
            self.now.ends_at = a[0] if call == 218 else self.now.ends_at
            return self.now.tid
        if call == 24:  # sched_yield
            return self.leave(0, ready=True)
        if call in (200, 234):  # tkill, tgkill: of abort
            return self.stop(134, "the program ended itself by a signal")
        if call == 231:  # exit_group
            return self.stop(a[0] & 255)
        handler = {9: self.mmap, 11: self.munmap, 20: self.vector, 35: self.sleep, 230: self.sleep,
                   56: self.clone, 60: self.exit, 202: self.futex, 228: self.clock}
        if call in handler:
            return handler[call](*a)
        if call not in (25, 158, 334, 435):  # mremap, rseq, clone3: there are other ways
            print(f"emulator: no system call {call}", file=sys.stderr)
        return -errno.ENOSYS

    def host(self, call, a, pointers):
        values = [ctypes.c_long(HOST + value if value and i in pointers else value) for i, value in enumerate(a)]
        result = libc.syscall(ctypes.c_long(call), *values)
        return -ctypes.get_errno() if result == -1 else result

    def vector(self, file, at, count, *_):
        parts = [read(*struct.unpack("<QQ", read(at + 16 * i, 16))) for i in range(count)]
        try:
            return os.write(file, b"".join(parts))
        except OSError as problem:
            return -problem.errno

    def take(self, size):
        if self.free[size]:
            return self.free[size].pop()
        align = PAGE if size < 1 << 21 else 1 << 21
        at = (self.next_map + align - 1) & -align
        self.next_map = at + size
        assert self.next_map < STACK - (64 << 20), "memory is spent"
        return at

    def clear(self, at, size):
        self.host(28, [at, size, 4], [0])

    def mmap(self, at, size, protection, flags, file, offset):
        size = up(size)
        if flags & 16:  # fixed
            self.clear(at, size)
        else:
            at = self.take(size)
        done = 0 if flags & 32 else self.host(17, [file, at, size, offset], [1])
        return at if done >= 0 else done

    def munmap(self, at, size, *_):
        self.clear(at, up(size))
        self.free[up(size)].append(at)
        return 0

    def clone(self, flags, stack, parent, child, tls, _):
        assert flags & 0x10000, "no processes"
        self.threads += 1
        thread = Thread(self.threads, self.registers(rax=0, rsp=stack), tls)
        if flags & 0x100000:
            write(parent, struct.pack("<I", thread.tid))
        if flags & 0x200000:
            thread.ends_at = child
        self.ready.append(thread)
        return thread.tid

    def exit(self, *_):
        if self.now.ends_at:
            write(self.now.ends_at, bytes(4))
            self.wake(self.now.ends_at, 1 << 30)
        return self.leave(None)

    def clock(self, clock, at, *_):
        now = self.time() if clock in (1, 4, 6, 7) else time.clock_gettime(clock) + self.skew
        write(at, struct.pack("<qq", int(now), int(now % 1 * 1e9)))
        return 0

    def sleep(self, *a):
        at, absolute = (a[2], a[1] & 1) if self.cpu.rax == 230 else (a[0], False)
        until = number(at, "<q") + number(at + 8, "<q") / 1e9 + (0 if absolute else self.time())
        return self.leave(0, until=until)


def main():
    arguments = sys.argv[1:]
    count = arguments[:1] == ["--count"]
    if not arguments[count:]:
        sys.exit(__doc__)
    use_model()
    started, kernel = time.monotonic(), Kernel(*arguments[count:count + 1], arguments[count + 1:], count)
    code = kernel.run()
    spent = f"{time.monotonic() - started:.1f} s, {kernel.calls} system calls, {kernel.threads} threads"
    print(f"emulator: exit {code}, {spent}", file=sys.stderr)
    for (table, prefix, opcode), times in sorted(kernel.seen.items(), key=lambda item: -item[1]):
        print(f"emulator: 512 bits, map {table}, prefix {prefix}, opcode {opcode:02x}: {times}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)  # The package leaks, and says so for two hundred lines.


main()
