#!/usr/bin/env python3
"""What an NBD client may rely on, asked of every export of one volume, with libnbd and, below it, raw sockets.

Each case is a function `case_*` that raises on a finding. All of them run; the exit code is the number that failed.
"""
import argparse
import errno
import os
import random
import socket
import struct
import sys
import traceback
import urllib.parse

import nbd

NBDMAGIC, IHAVEOPT, REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED = 1, 2, 3, 5, 6, 7, 8
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
INFO_BLOCK_SIZE = 3
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN = 0x80000001, 0x80000002, 0x80000003, 0x80000006
REQUEST_MAGIC, SIMPLE_MAGIC = 0x25609513, 0x67446698
MIB = 1 << 20


class Finding(Exception):
    pass


def expect(holds, text):
    if not holds:
        raise Finding(text)


class Raw:
    """The wire without a library, for what libnbd would not send."""

    def __init__(self, uri, flags=3):
        parts = urllib.parse.urlparse(uri)
        if parts.scheme == "nbd+unix":
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(10)
            self.socket.connect(urllib.parse.parse_qs(parts.query)["socket"][0])
        else:
            self.socket = socket.create_connection((parts.hostname, parts.port), timeout=10)
        expect(self.read(16) == NBDMAGIC + IHAVEOPT, "the greeting is not fixed newstyle's")
        self.server_flags = struct.unpack(">H", self.read(2))[0]
        self.socket.sendall(struct.pack(">I", flags))

    def read(self, length):
        data = b""
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            expect(part, f"the server closed after {len(data)} of {length} bytes")
            data += part
        return data

    def closed(self):
        try:
            while self.socket.recv(65536):
                pass
            return True
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def option(self, option, data=b""):
        self.socket.sendall(IHAVEOPT + struct.pack(">II", option, len(data)) + data)

    def reply(self, option):
        magic, answered, kind, length = struct.unpack(">QIII", self.read(20))
        expect(magic == REPLY_MAGIC, f"option reply magic is {magic:#x}")
        expect(answered == option, f"the reply is to option {answered}, not {option}")
        return kind, self.read(length)

    def go(self, name, option=OPT_GO):
        """Asks for an export; returns all replies, the last of them not an INFO."""
        name = name.encode()
        self.option(option, struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, INFO_BLOCK_SIZE))
        replies = [self.reply(option)]
        while replies[-1][0] == REP_INFO:
            replies.append(self.reply(option))
        return replies

    def request(self, kind, offset, length, flags=0, cookie=7, magic=REQUEST_MAGIC):
        self.socket.sendall(struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length))

    def any_simple_reply(self):
        magic, error, answered = struct.unpack(">IIQ", self.read(16))
        expect(magic == SIMPLE_MAGIC, f"reply magic is {magic:#x}")
        return answered, error

    def simple_reply(self, cookie=7):
        answered, error = self.any_simple_reply()
        expect(answered == cookie, f"the reply is to cookie {answered}, not {cookie}")
        return error


def connect(uri, structured=True, strict=True, context=False):
    handle = nbd.NBD()
    if context:
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.set_request_structured_replies(structured)
    if not strict:
        handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return handle


def refused(call, allowed, what):
    """Runs a call that must fail with one of these errnos."""
    try:
        call()
    except nbd.Error as error:
        expect(error.errnum in allowed, f"{what}: errno {error.errnum} ({error.string}), expected one of {allowed}")
        return
    raise Finding(f"{what}: was accepted")


def block_of(byte, args):
    return bytes([byte]) * args.block_bytes


# What an export says of itself.


def case_properties(args):
    for uri in args.uris:
        h = connect(uri, context=True)
        expect(h.get_size() == args.bytes, f"{uri}: size {h.get_size()}, expected {args.bytes}")
        sizes = [h.get_block_size(which) for which in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
        expect(sizes == [args.block_bytes, 4096, 32 * MIB], f"{uri}: block sizes {sizes}")
        expect(not h.is_read_only() and not h.is_rotational(), f"{uri}: read-only or rotational")
        for name in ("flush", "fua", "trim", "zero", "df", "multi_conn"):
            expect(getattr(h, "can_" + name)(), f"{uri}: does not offer {name}")
        expect(h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION), f"{uri}: no base:allocation")
        expect(h.get_structured_replies_negotiated(), f"{uri}: no structured replies")
        expect(h.get_protocol() == "newstyle-fixed", h.get_protocol())


def case_list_names_the_export(args):
    for uri in args.uris:
        raw = Raw(uri)
        raw.option(OPT_LIST)
        names = []
        while True:
            kind, data = raw.reply(OPT_LIST)
            if kind == REP_ACK:
                break
            expect(kind == REP_SERVER, f"reply {kind:#x} to LIST")
            names.append(data[4:4 + struct.unpack(">I", data[:4])[0]].decode())
        expect(args.name in names, f"{uri} lists {names}")
        raw.option(OPT_LIST, b"surplus")
        expect(raw.reply(OPT_LIST)[0] == ERR_INVALID, "LIST with data is not refused as invalid")


def case_unknown_export_is_refused_with_its_name(args):
    for option in (OPT_GO, OPT_INFO):
        raw = Raw(args.uris[0])
        kind, text = raw.go("no-such-volume", option)[-1]
        expect(kind == ERR_UNKNOWN, f"reply {kind:#x} instead of ERR_UNKNOWN")
        expect(b"no-such-volume" in text, f"the reason is {text!r}")
        expect(raw.go(args.name)[-1][0] == REP_ACK, "after a refused export the right one is refused too")


def case_unknown_options_are_refused_and_survived(args):
    raw = Raw(args.uris[0])
    for option, data in ((0x7777, b""), (0x7777, b"x" * 3000), (OPT_STARTTLS, b"")):
        raw.option(option, data)
        kind, _ = raw.reply(option)
        expect(kind in (ERR_UNSUP, ERR_POLICY), f"option {option}: reply {kind:#x}")
    raw.option(OPT_GO, b"\0")
    expect(raw.reply(OPT_GO)[0] == ERR_INVALID, "a GO cut short is not refused as invalid")
    expect(raw.go(args.name)[-1][0] == REP_ACK, "GO fails after refused options")


def case_info_then_go_agree(args):
    raw = Raw(args.uris[0])
    info, go = raw.go(args.name, OPT_INFO), raw.go(args.name, OPT_GO)
    expect(info[-1][0] == REP_ACK and go[-1][0] == REP_ACK, "INFO or GO is refused")
    expect(sorted(info) == sorted(go), f"INFO says {info}, GO says {go}")


def case_export_name_of_old_clients(args):
    for flags, zeroes in ((3, 0), (1, 124)):
        raw = Raw(args.uris[0], flags)
        raw.option(OPT_EXPORT_NAME, args.name.encode())
        size = struct.unpack(">Q", raw.read(8))[0]
        raw.read(2 + zeroes)
        expect(size == args.bytes, f"EXPORT_NAME gives size {size}")
        raw.request(0, 0, 4096)
        expect(raw.simple_reply() == 0, "read after EXPORT_NAME fails")
        raw.read(4096)
    raw = Raw(args.uris[0])
    raw.option(OPT_EXPORT_NAME, b"no-such-volume")
    expect(raw.closed(), "an unknown EXPORT_NAME does not close the connection")


def case_abort_is_acknowledged(args):
    raw = Raw(args.uris[0])
    raw.option(OPT_ABORT)
    expect(raw.reply(OPT_ABORT)[0] == REP_ACK and raw.closed(), "ABORT is not acknowledged and closed")


# Data.


def case_written_on_one_export_is_read_on_every_other(args):
    handles = [connect(uri) for uri in args.uris]
    for turn in range(60):
        writer = handles[turn % len(handles)]
        offset = (turn * 7919 * 4096) % (args.bytes - 4096)
        offset -= offset % 4096
        data = random.randbytes(4096)
        writer.pwrite(data, offset)
        for reader, uri in zip(handles, args.uris):
            found = bytes(reader.pread(4096, offset))
            expect(found == data, f"turn {turn}: {uri} does not see what export {turn % len(handles)} acknowledged")


def case_many_in_flight_come_back_right(args):
    h = connect(args.uris[-1])
    count = 200
    offsets = random.sample(range(0, args.bytes // 4096 - 64), count)
    order, buffers = [], {}
    for at in offsets:
        h.pwrite(struct.pack(">Q", at) * 512, at * 4096)
    for turn, at in enumerate(offsets):
        length = 4096 * (64 if turn % 10 == 0 else 1)
        buffers[at] = nbd.Buffer(length)

        def done(error, at=at):
            order.append((at, getattr(error, "value", error)))
            return 1

        h.aio_pread(buffers[at], at * 4096, done)
    while len(order) < count:
        expect(h.poll(10000) == 1, f"{count - len(order)} reads are unanswered for 10 s")
    for at, error in order:
        expect(error == 0, f"read of block {at}: errno {error}")
        found = bytes(buffers[at].to_bytearray())[:4096]
        expect(found == struct.pack(">Q", at) * 512, f"block {at} holds another's data")
    print(f"  {sum(1 for got, sent in zip(order, offsets) if got[0] != sent)} of {count} out of order")


def case_structured_reads_and_df(args):
    h = connect(args.uris[0])
    h.pwrite(b"\x11" * MIB, 0)
    h.zero(256 * 1024, 256 * 1024)
    expected = b"\x11" * 256 * 1024 + bytes(256 * 1024) + b"\x11" * 512 * 1024
    for flags in (0, nbd.CMD_FLAG_DF):
        pieces = []

        def chunk(data, offset, status, error):
            pieces.append((offset, len(data), status))

        found = bytes(h.pread_structured(MIB, 0, chunk, flags))
        expect(found == expected, f"flags {flags}: wrong data")
        expect(sum(length for _, length, _ in pieces) >= 512 * 1024, f"flags {flags}: pieces {pieces}")
        expect(not flags or len(pieces) == 1, f"DF, but the reply came in {len(pieces)} pieces")


def case_clients_without_structured_replies(args):
    h = connect(args.uris[0], structured=False)
    h.pwrite(b"\x22" * 65536, 8 * MIB)
    expect(bytes(h.pread(65536, 8 * MIB)) == b"\x22" * 65536, "wrong data by simple replies")


def case_largest_requests(args):
    h = connect(args.uris[0])
    data = random.randbytes(32 * MIB)
    h.pwrite(data, 4 * MIB + 4096)
    expect(bytes(h.pread(32 * MIB, 4 * MIB + 4096)) == data, "32 MiB come back wrong")


def case_zeroes_and_trim(args):
    h = connect(args.uris[0])
    size = 65 * MIB
    for flags in (0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA):
        for start in range(0, size, MIB):
            h.pwrite(b"\x33" * MIB, start)
        h.pwrite(b"\x33" * 4096, size)
        h.zero(size, 0, flags)
        for start in range(0, size, MIB):
            expect(not any(h.pread(MIB, start)), f"flags {flags}: not zero at {start}")
        expect(bytes(h.pread(4096, size)) == b"\x33" * 4096, f"flags {flags}: zeroed past the end")
    h.pwrite(b"\x44" * MIB, 0)
    h.trim(512 * 1024, 0, nbd.CMD_FLAG_FUA)
    expect(bytes(h.pread(512 * 1024, 512 * 1024)) == b"\x44" * 512 * 1024, "trim reached past its end")
    found = set(bytes(h.pread(512 * 1024, 0)))
    expect(found <= {0x44, 0}, f"a trimmed range holds {found}")


def case_zeroes_of_parts_of_blocks(args):
    h = connect(args.uris[0])
    unit = args.block_bytes
    h.pwrite(b"\x55" * 65536, 16 * MIB)
    h.zero(3 * unit, 16 * MIB + unit)
    h.trim(unit, 16 * MIB + 8 * unit)
    data = bytes(h.pread(65536, 16 * MIB))
    expect(data[:unit] == b"\x55" * unit, "zeroes before the range")
    expect(data[unit:4 * unit] == bytes(3 * unit), "no zeroes in the range")
    expect(data[4 * unit:8 * unit] == b"\x55" * 4 * unit, "zeroes after the range")


def case_fua_and_flush(args):
    h = connect(args.uris[0])
    h.pwrite(b"\x66" * 4096, 4096, nbd.CMD_FLAG_FUA)
    h.flush()
    expect(bytes(h.pread(4096, 4096)) == b"\x66" * 4096, "FUA write is lost")


def case_block_status_covers_the_volume(args):
    h = connect(args.uris[0], context=True)
    h.pwrite(b"\x77" * 4096, 0)
    at = 0
    while at < args.bytes:
        extents = []
        length = min(args.bytes - at, 1 << 31)
        h.block_status(length, at, lambda context, offset, entries, error: extents.extend(entries))
        covered = sum(extents[0::2])
        expect(covered > 0 and len(extents) % 2 == 0, f"no extents at {at}")
        expect(at > 0 or extents[1] & 1 == 0, "a written block is called a hole")
        expect(all(flags & ~3 == 0 for flags in extents[1::2]), f"unknown flags in {extents[:20]}")
        at += covered
    expect(at == args.bytes, f"extents end at {at}, the volume at {args.bytes}")
    one = []
    h.block_status(MIB, 0, lambda context, offset, entries, error: one.extend(entries), nbd.CMD_FLAG_REQ_ONE)
    expect(len(one) == 2 and one[0] <= MIB, f"REQ_ONE gives {one}")


# Bad requests: refused one by one, and the connection lives on.


def case_unaligned_requests_are_refused(args):
    h = connect(args.uris[0], strict=False)
    unit, odd = args.block_bytes, args.block_bytes // 2
    h.pwrite(block_of(0x88, args), 0)
    for offset, length in ((odd, unit), (0, odd), (1, unit), (0, unit + 1)):
        what = f"{length} bytes at {offset}"
        refused(lambda: h.pread(length, offset), [errno.EINVAL], f"read of {what}")
        refused(lambda: h.pwrite(b"\x99" * length, offset), [errno.EINVAL], f"write of {what}")
        refused(lambda: h.zero(length, offset), [errno.EINVAL], f"zeroes of {what}")
    expect(bytes(h.pread(unit, 0)) == block_of(0x88, args), "a refused write was written")


def case_requests_past_the_end_are_refused(args):
    h = connect(args.uris[0], strict=False)
    unit = args.block_bytes
    for offset in (args.bytes - unit, args.bytes, (1 << 64) - 2 * unit, 1 << 63):
        what = f"{2 * unit} bytes at {offset}"
        if offset < 1 << 63:
            refused(lambda: h.pread(2 * unit, offset), [errno.EINVAL], f"read of {what}")
            refused(lambda: h.pwrite(bytes(2 * unit), offset), [errno.EINVAL, errno.ENOSPC], f"write of {what}")
            refused(lambda: h.trim(2 * unit, offset), [errno.EINVAL], f"trim of {what}")
        else:
            raw = Raw(args.uris[0])
            expect(raw.go(args.name)[-1][0] == REP_ACK, "GO is refused")
            raw.request(0, offset, 2 * unit)
            expect(raw.simple_reply() == errno.EINVAL, f"read of {what} is not refused as invalid")
    h.pread(unit, args.bytes - unit)


def case_too_long_requests_are_refused(args):
    h = connect(args.uris[0], strict=False)
    length = 32 * MIB + 4096
    refused(lambda: h.pread(length, 0), [errno.EINVAL, errno.EOVERFLOW], "read above the maximum")
    expect(len(h.pread(4096, 0)) == 4096, "the connection is lost after a long read")
    # A long write is either read to its end and refused, or the connection is closed: it must not be taken.
    data = b"\xaa" * length
    try:
        h.pwrite(data, 0)
        raise Finding("a write above the maximum was accepted")
    except nbd.Error:
        pass
    h = connect(args.uris[0])
    expect(bytes(h.pread(4096, 0)) != b"\xaa" * 4096, "a refused write was written")


def case_unknown_commands_and_flags_are_refused(args):
    raw = Raw(args.uris[0])
    expect(raw.go(args.name)[-1][0] == REP_ACK, "GO is refused")
    for kind, flags in ((99, 0), (0, 0x8000), (3, 0x4000)):
        raw.request(kind, 0, 4096 if kind != 3 else 0, flags)
        error = raw.simple_reply()
        expect(error in (errno.EINVAL, errno.ENOTSUP), f"command {kind}, flags {flags:#x}: errno {error}")
    raw.request(0, 0, 4096)
    expect(raw.simple_reply() == 0 and len(raw.read(4096)) == 4096, "no read after refused commands")


def case_a_broken_client_hurts_only_itself(args):
    bystander = connect(args.uris[0])
    raw = Raw(args.uris[0])
    expect(raw.go(args.name)[-1][0] == REP_ACK, "GO is refused")
    raw.request(0, 0, 4096, magic=0xDEADBEEF)
    expect(raw.closed(), "a wrong request magic does not close the connection")
    for cut in range(0, 28, 3):
        raw = Raw(args.uris[0])
        raw.go(args.name)
        raw.socket.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 1, 1, 0, 4096)[:cut])
        raw.socket.close()
    for _ in range(100):
        raw = Raw(args.uris[0])
        raw.go(args.name)
        for cookie in range(16):
            raw.request(0, cookie * MIB, MIB, cookie=cookie)
        raw.socket.close()
    for _ in range(200):
        raw = Raw(args.uris[0])
        raw.socket.sendall(random.randbytes(random.randrange(1, 200)))
        raw.socket.close()
    expect(len(bystander.pread(MIB, 0)) == MIB, "a bystander is disconnected")


def case_disconnect_is_orderly(args):
    h = connect(args.uris[0])
    h.pwrite(block_of(1, args), 0)
    h.shutdown()
    raw = Raw(args.uris[0])
    raw.go(args.name)
    raw.request(2, 0, 0)
    expect(raw.closed(), "DISC does not close the connection")


def case_what_was_asked_for_before_a_disconnect_is_done(args):
    h = connect(args.uris[0])
    h.pwrite(b"\1" * MIB, 0)
    raw = Raw(args.uris[0])
    raw.go(args.name)
    # Write 64 KiB, read 1 MiB in several pieces, leave: all in one send.
    header = lambda kind, cookie, length: struct.pack(">IHHQQI", REQUEST_MAGIC, 0, kind, cookie, 0, length)
    raw.socket.sendall(header(1, 1, 65536) + b"\2" * 65536 + header(0, 2, MIB) + header(2, 3, 0))
    replies = {}
    for _ in range(2):
        cookie, error = raw.any_simple_reply()
        replies[cookie] = error
        if cookie == 2 and error == 0:
            raw.read(MIB)
    expect(replies == {1: 0, 2: 0}, f"the replies are {replies}")
    expect(raw.closed(), "DISC does not close the connection")
    expect(h.pread(65536, 0) == b"\2" * 65536, "the write is lost")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--block-bytes", type=int, required=True)
    parser.add_argument("--name", default="vol0")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("uris", nargs="+")
    args = parser.parse_args()
    random.seed(args.seed)
    failed = 0
    for name, case in list(globals().items()):
        if name.startswith("case_") and args.only in name:
            try:
                case(args)
                print(f"ok {name[5:]}", flush=True)
            except (Finding, nbd.Error, OSError) as error:
                failed += 1
                where = traceback.extract_tb(sys.exc_info()[2])[-1].lineno
                print(f"FAILED {name[5:]} (line {where}): {type(error).__name__}: {error}", flush=True)
    os._exit(min(failed, 100))


main()
