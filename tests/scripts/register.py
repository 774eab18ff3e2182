#!/usr/bin/env python3
"""A register workload over NBD: it writes numbered blocks, survives lost connections, and checks what it reads.

Each 4 KiB block is a register. A write carries the block's next number; at most one write of a block is in flight,
and one whose connection died is sent again, on another connection, until it is acknowledged. Hence the history check
is an interval: a read may return any number between the last one acknowledged or seen before the read was sent, and
the last one sent before its answer came. A block must be whole: all 4,096 bytes are of one write, or all are zero
where a zero was written (or nothing ever was).

  run    mixes writes, reads, zeroes and flushes for --seconds, then reads everything back through every URI
  check  only reads everything back through every URI

The history is kept in --state, so that later runs and checks go on from it. With --trace FILE every operation is
appended to it, one line each (see tests/src/chaos/trace.rs), for a checker that knows nothing of this one's rules. Exit codes: 0 right, 1 a wrong read or an
IO that failed or hung; the last line of stdout is a JSON summary.
"""
import argparse
import json
import os
import random
import select
import struct
import sys
import time

import nbd

BLOCK = 4096
HEADER = struct.Struct("<8sQQQ")
MAGIC = b"ASHLARrg"
ZERO = bytes(BLOCK)
SIZES = [1, 1, 1, 1, 2, 4, 8, 32, 64]
ENOSPC = 28


class Wrong(Exception):
    """What the workload exists to find."""


def content(seed, block, number):
    return HEADER.pack(MAGIC, seed, block, number) * (BLOCK // HEADER.size)


class History:
    """What each block may hold: numbers from `low` to `issued`, of which `zeros` are writes of zeroes."""

    def __init__(self, seed, blocks):
        self.seed, self.blocks = seed, blocks
        self.low, self.issued = [0] * blocks, [0] * blocks
        self.zeros = {}

    @classmethod
    def load(cls, path):
        with open(path) as file:
            state = json.load(file)
        history = cls(state["seed"], len(state["low"]))
        history.low, history.issued = state["low"], state["issued"]
        history.zeros = {int(block): set(numbers) for block, numbers in state["zeros"].items()}
        return history

    def save(self, path):
        self.prune()
        state = {"seed": self.seed, "low": self.low, "issued": self.issued,
                 "zeros": {block: sorted(numbers) for block, numbers in self.zeros.items()}}
        with open(path + ".new", "w") as file:
            json.dump(state, file)
        os.rename(path + ".new", path)

    def next_write(self, block, zero):
        self.issued[block] += 1
        if zero:
            self.zeros.setdefault(block, set()).add(self.issued[block])
        return self.issued[block]

    def raise_low(self, block, number):
        self.low[block] = max(self.low[block], number)

    def prune(self):
        """Forgets zeroes that can no longer be read. Not done while a read is under way: it may still return one
        that was sent and overwritten since the read was sent."""
        for block in list(self.zeros):
            self.zeros[block] = {zero for zero in self.zeros[block] if zero >= self.low[block]}
            if not self.zeros[block]:
                del self.zeros[block]

    def check(self, block, data, low, where):
        """Checks one block that was read, given `low` as it was when the read was sent; returns its number."""
        high = self.issued[block]
        expected = f"block {block} ({where}): expected a number from {low} to {high}"
        if data == ZERO:
            candidates = [zero for zero in self.zeros.get(block, ()) if low <= zero <= high]
            if low == 0:
                candidates.append(0)
            if not candidates:
                raise Wrong(f"{expected}, found zeroes: an acknowledged write is lost")
            return min(candidates)
        magic, seed, owner, number = HEADER.unpack_from(data)
        if magic != MAGIC or seed != self.seed:
            raise Wrong(f"{expected}, found foreign bytes {data[:32].hex()}")
        if owner != block:
            raise Wrong(f"{expected}, found block {owner}, number {number}: a misdirected write or read")
        if data != content(seed, block, number):
            raise Wrong(f"{expected}, found number {number} torn: not all of its bytes are of one write")
        if not low <= number <= high:
            raise Wrong(f"{expected}, found {number}: {'an acknowledged write is lost' if number < low else 'from nowhere'}")
        return number


class Op:
    def __init__(self, kind, block, count):
        self.kind, self.block, self.count = kind, block, count
        self.numbers = self.low = self.buffer = self.uri = None
        self.fua = False
        self.born = self.sent = 0.0

    def span(self):
        return range(self.block, self.block + self.count)


class Connection:
    def __init__(self, uri):
        self.uri, self.handle, self.ops, self.retry_at = uri, None, set(), 0.0

    def alive(self):
        return self.handle is not None

    def connect(self):
        try:
            handle = nbd.NBD()
            handle.connect_uri(self.uri)
            self.handle = handle
            return True
        except nbd.Error:
            self.retry_at = time.monotonic() + 0.1
            return False


class Workload:
    def __init__(self, args, history):
        self.args, self.history = args, history
        self.random = random.Random(f"{args.seed}/{time.time_ns() if args.vary else 0}")
        self.connections = [Connection(uri) for uri in args.uris]
        self.at = 0
        self.writing, self.queue, self.done = set(), [], []
        self.trace = open(args.trace, "a") if args.trace else None
        self.count = {"write": 0, "read": 0, "zero": 0, "flush": 0, "retried": 0, "reconnects": 0, "enospc": 0}
        self.longest = 0.0
        self.started = time.monotonic()

    # Choosing a connection.

    def candidates(self):
        """Every connection of a multi-path host, or the current one of a host that fails over."""
        return self.connections if self.args.attach == "all" else [self.connections[self.at]]

    def usable(self):
        now = time.monotonic()
        for connection in self.candidates():
            if not connection.alive() and now >= connection.retry_at:
                if connection.connect():
                    self.count["reconnects"] += 1
                elif self.args.attach == "one":
                    self.at = (self.at + 1) % len(self.connections)
        return [connection for connection in self.candidates() if connection.alive()]

    def lost(self, connection):
        if connection.handle is None:
            return
        connection.handle = None
        connection.retry_at = time.monotonic() + 0.05
        for op in connection.ops:
            self.queue.append(op)
            self.count["retried"] += 1
        connection.ops = set()
        if self.args.attach == "one":
            self.at = (self.at + 1) % len(self.connections)

    # Making and sending operations.

    def new_op(self):
        kind = self.random.choices(["write", "read", "zero", "flush"], [60, 34, 4, 2])[0]
        if kind == "flush":
            return Op(kind, 0, 0)
        count = self.random.choice(SIZES)
        block = self.random.randrange(self.history.blocks - count + 1)
        op = Op(kind, block, count)
        if kind != "read":
            if any(at in self.writing for at in op.span()):
                return None
            self.writing.update(op.span())
            op.numbers = [self.history.next_write(at, kind == "zero") for at in op.span()]
            op.fua = self.random.random() < 0.1
        return op

    def send(self, connection, op):
        handle, offset = connection.handle, op.block * BLOCK
        op.uri = connection.uri
        op.sent = time.monotonic()
        op.born = op.born or op.sent
        flags = nbd.CMD_FLAG_FUA if op.fua else 0
        finished = lambda error: self.finish(connection, op, getattr(error, "value", error))
        connection.ops.add(op)
        try:
            if op.kind == "write":
                # Not nbd.Buffer, here and below: that of libnbd 1.14 is never freed once it was used.
                op.buffer = b"".join(content(self.history.seed, at, n) for at, n in zip(op.span(), op.numbers))
                handle.aio_pwrite(op.buffer, offset, finished, flags)
            elif op.kind == "read":
                op.low = [self.history.low[at] for at in op.span()]
                op.buffer = bytearray(op.count * BLOCK)
                handle.aio_pread(op.buffer, offset, finished)
            elif op.kind == "zero":
                handle.aio_zero(op.count * BLOCK, offset, finished, flags)
            else:
                handle.aio_flush(finished)
        except nbd.Error:
            self.lost(connection)

    def finish(self, connection, op, error):
        # Called from within libnbd: only note it, so that no exception is lost there.
        self.done.append((connection, op, error))
        return 1

    def settle(self):
        done, self.done = self.done, []
        for connection, op, error in done:
            if op not in connection.ops:
                continue  # Its connection was given up and it was queued again.
            if error and (connection.handle is None or connection.handle.aio_is_dead() or error in (104, 107, 108, 32)):
                self.lost(connection)
                continue
            connection.ops.discard(op)
            self.complete(op, error)

    def complete(self, op, error):
        self.longest = max(self.longest, time.monotonic() - op.born)
        if error == ENOSPC and op.kind in ("write", "zero") and self.args.allow_enospc:
            self.tell_write(op, None)
            self.count["enospc"] += 1  # It may have been applied in part: its numbers stay possible.
        elif error:
            raise Wrong(f"{op.kind} of {op.count} blocks at block {op.block} through {op.uri}: {os.strerror(error)}")
        elif op.kind == "read":
            data, seen = bytes(op.buffer), []
            for at, block in enumerate(op.span()):
                part = data[at * BLOCK:(at + 1) * BLOCK]
                number = self.history.check(block, part, op.low[at], op.uri)
                self.history.raise_low(block, number)
                seen.append(0 if part == ZERO else number)
            self.tell(op, seen, time.monotonic())
        elif op.kind in ("write", "zero"):
            for block, number in zip(op.span(), op.numbers):
                self.history.raise_low(block, number)
            self.tell_write(op, time.monotonic())
        self.count[op.kind] += 1
        if op.numbers:
            self.writing.difference_update(op.span())

    def tell(self, op, numbers, ended):
        """A line of the trace; the beginning is when it was first sent, unlike a read's, which counts anew."""
        if self.trace:
            begun = op.sent if op.kind == "read" else op.born
            ended = "-" if ended is None else round(ended * 1e9)
            kind = "r" if op.kind == "read" else "w"
            print(kind, op.block, round(begun * 1e9), ended, *numbers, file=self.trace)

    def tell_write(self, op, ended):
        if op.born and op.numbers:
            self.tell(op, [0] * op.count if op.kind == "zero" else op.numbers, ended)

    def end_trace(self):
        """What was sent and never answered may have been done, or may be yet."""
        for op in [op for connection in self.connections for op in connection.ops] + self.queue:
            self.tell_write(op, None)
        if self.trace:
            self.trace.close()

    # The loop.

    def poll(self):
        poller, by_fd = select.poll(), {}
        for connection in self.connections:
            try:
                if connection.alive():
                    direction = connection.handle.aio_get_direction()
                    events = (select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0) | (
                        select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0)
                    fd = connection.handle.aio_get_fd()
                    by_fd[fd] = connection
                    poller.register(fd, events)
            except nbd.Error:
                self.settle()
                self.lost(connection)
        for fd, events in poller.poll(50):
            connection = by_fd[fd]
            try:
                direction = connection.handle.aio_get_direction()
                if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and direction & nbd.AIO_DIRECTION_READ:
                    connection.handle.aio_notify_read()
                elif events & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
                    connection.handle.aio_notify_write()
                elif events & (select.POLLHUP | select.POLLERR):
                    self.settle()
                    self.lost(connection)
            except nbd.Error:
                self.settle()
                self.lost(connection)
        self.settle()
        for connection in self.connections:
            if connection.alive() and (connection.handle.aio_is_dead() or connection.handle.aio_is_closed()):
                self.lost(connection)

    def in_flight(self):
        return sum(len(connection.ops) for connection in self.connections)

    def check_hung(self):
        now = time.monotonic()
        pending = [op for connection in self.connections for op in connection.ops] + self.queue
        hung = [op for op in pending if op.born and now - op.born > self.args.op_limit]
        if hung:
            op = hung[0]
            raise Wrong(f"{op.kind} at block {op.block} through {op.uri} unanswered for {self.args.op_limit} s")

    def fill(self, usable, fresh):
        while self.queue and usable:
            op = self.queue.pop(0)
            self.send(self.random.choice(usable), op)
            usable = [connection for connection in usable if connection.alive()]
        tries = 0
        while fresh and usable and self.in_flight() < self.args.depth and tries < 4 * self.args.depth:
            tries += 1
            op = self.new_op()
            if op is not None:
                self.send(self.random.choice(usable), op)
                usable = [connection for connection in usable if connection.alive()]

    def dead(self):
        return self.args.until_dead and self.count["retried"] + len(self.queue) > 0

    def run(self):
        """Returns whether the cluster was still there at the end."""
        end = self.started + self.args.seconds
        while True:
            usable = self.usable()
            if self.dead():
                return False
            fresh = time.monotonic() < end
            if not fresh and not self.queue and not self.in_flight():
                return True
            self.fill(usable, fresh)
            if self.in_flight():
                self.poll()
            elif not usable:
                time.sleep(0.02)
            self.check_hung()


def read_back(args, history):
    """Reads every block through every URI, one after another, so that all of them must agree."""
    step = 64
    for uri in args.uris:
        handle = connect_patiently(uri, args.op_limit)
        for start in range(0, history.blocks, step):
            count = min(step, history.blocks - start)
            try:
                data = bytes(handle.pread(count * BLOCK, start * BLOCK))
            except nbd.Error as error:
                raise Wrong(f"reading {count} blocks at block {start} through {uri}: {error.string}") from error
            for at in range(count):
                part, block = data[at * BLOCK:(at + 1) * BLOCK], start + at
                history.raise_low(block, history.check(block, part, history.low[block], uri))
        handle.shutdown()


def connect_patiently(uri, limit):
    end = time.monotonic() + limit
    while True:
        try:
            handle = nbd.NBD()
            handle.connect_uri(uri)
            return handle
        except nbd.Error as error:
            if time.monotonic() > end:
                raise Wrong(f"{uri} refuses connections for {limit} s: {error.string}") from error
            time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["run", "check"])
    parser.add_argument("--state", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--blocks", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--attach", choices=["one", "all"], default="all")
    parser.add_argument("--op-limit", type=float, default=30)
    parser.add_argument("--until-dead", action="store_true", help="stop, successfully, when a connection is lost")
    parser.add_argument("--allow-enospc", action="store_true")
    parser.add_argument("--trace")
    parser.add_argument("--no-check", action="store_true", help="do not read everything back after a run")
    parser.add_argument("--vary", action="store_true", help="do not replay the same choices from the seed")
    parser.add_argument("uris", nargs="+")
    args = parser.parse_args()
    history = History.load(args.state) if os.path.exists(args.state) else History(args.seed, args.blocks)
    workload, result, text = Workload(args, history), 0, "right"
    try:
        survived = workload.run() if args.command == "run" else True
        workload.end_trace()
        history.save(args.state)
        if survived and not args.no_check:
            read_back(args, history)
    except Wrong as wrong:
        result, text = 1, str(wrong)
        print(f"seed {args.seed}, {time.monotonic() - workload.started:.1f} s after the start: {wrong}", file=sys.stderr)
    history.save(args.state)
    print(json.dumps({"result": text, "longest_ms": round(workload.longest * 1000), **workload.count}))
    sys.stdout.flush()
    # libnbd's handles may wait for a dead peer when collected.
    os._exit(result)


main()
