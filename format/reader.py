#!/usr/bin/env python3
"""Reads an alight store by SPEC.md alone: no Rust, nothing but Python 3.9 and its standard library.

    reader.py list STORE              one line for each key: key, dtype, shape, bytes
    reader.py extract STORE OUTDIR    each value into a file of its own, and OUTDIR/index.json to say which

Replays the commits in the segments and ignores the index. Writes nothing into the store. Exits with 1 on damage.
"""
import json
import mmap
import os
import re
import struct
import sys
from zlib import crc32

BLOCK, PAYLOAD_SYNCED, PUT, DELETE, ALIAS = 4096, 1, 1, 2, 3
DTYPES = ("none BOOL U8 I8 U16 I16 U32 I32 U64 I64 F16 BF16 F32 F64 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ "
          "C64 C128 F4 F6_E2M3 F6_E3M2").split()
PRELUDE = "salt offset seq frame_len payload_len synced_through body_len entries flags previous part parts".split()


class Damage(Exception):
    pass


class Body:
    """Takes values off the front: little-endian integers, strings and lists behind a 64-bit count."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, layout):
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values if len(values) > 1 else values[0]

    def string(self):
        return self.take(f"{self.take('Q')}s")

    def list(self, item):
        return [item() for _ in range(self.take("Q"))]

    def entry(self):
        found = {"key": self.string(), "kind": self.take("B"), "dtype": self.take("B")}
        found["shape"] = self.list(lambda: self.take("Q"))
        found["attributes"] = self.list(lambda: (self.string().decode(), self.string()))
        found["segment"], found["offset"], found["length"], found["crc"] = self.take("QQQI")
        found["chunk_crcs"], found["frame_offset"] = self.list(lambda: self.take("I")), self.take("Q")
        found["origin"] = self.take("Q")
        return found


def sealed(data, magic):
    """Whether these bytes begin with this magic and end with the CRC-32 of all before."""
    return len(data) > 12 and data[:8] == magic and crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0]


def frame(data, offset, salt):
    """The frame that begins at this offset of this segment, whole and verified; or None."""
    head = data[offset:offset + 96]
    if len(head) < 96 or not sealed(head, b"ALIGHTfr"):
        return None
    found = dict(zip(PRELUDE, struct.unpack_from("<QQQQQQQIIIHH", head, 8)))
    whole = data[offset:offset + found["frame_len"]]
    if (found["salt"], found["offset"], found["frame_len"]) != (salt, offset, len(whole)) or not sealed(whole, head[:8]):
        return None
    if found["parts"] != 1:
        raise Damage("a commit is striped over several directories, which this reader cannot join")
    body = Body(whole[96:96 + found["body_len"]])
    found["entries"], found["payload"] = body.list(body.entry), offset + found["frame_len"]
    return found


class Store:
    """The accepted state of a store: for each key its newest entry, and where its value lies."""

    def __init__(self, path):
        if os.path.exists(os.path.join(path, "UNFINISHED")):
            raise Damage("a store that is still being made from another one")
        self.read_manifest(os.path.join(path, "MANIFEST"))
        self.data, self.commits, self.synced, self.values = {}, {}, self.covered, {}
        folder = os.path.join(path, "segments")
        found = {int(name[:-4]) for name in os.listdir(folder) if re.fullmatch(r"\d{8,}\.seg", name)}
        for number in sorted(found | set(self.segments)):
            if number in self.segments or number >= self.next_segment:  # others were left behind by a compaction
                self.read_segment(number, os.path.join(folder, f"{number:08}.seg"))
        newest = {}  # for each key, as of which commit its entry counts: one that compaction moved is as old as ever
        for seq in self.accepted():
            number, commit = self.commits[seq]
            for entry in commit["entries"]:
                if (entry["origin"] or seq) < newest.get(entry["key"], 0):
                    continue
                newest[entry["key"]] = entry["origin"] or seq
                self.values.pop(entry["key"], None)
                if entry["kind"] != DELETE:
                    self.values[entry["key"]] = (entry, *self.place(number, commit, entry))

    def read_manifest(self, path):
        with open(path, "rb") as file:
            data = file.read()
        if not sealed(data[:64], b"ALIGHTmf"):
            raise Damage(f"{path}: the head is damaged, or this is no alight store")
        version, incompatible = struct.unpack_from("<I20xQ", data, 8)
        if version != 1 or incompatible:
            raise Damage(f"{path}: a newer reader is needed: version {version}, incompatible features {incompatible:#x}")
        if not sealed(data, b"ALIGHTmf"):
            raise Damage(f"{path}: wrong checksum")
        body = Body(data[64:-4])
        self.id, self.covered, self.next_segment, _, _ = body.take("16sQQQQ")
        self.segments = {record[0]: record for record in body.list(lambda: body.take("QQQIBQQQQQQQ"))}

    def read_segment(self, number, path):
        _, salt, end, _, is_sealed, *_ = self.segments.get(number, (number, None, BLOCK, 0, 0))
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
        whole = sealed(data[:BLOCK], b"ALIGHTsg") and struct.unpack("<16sQ", data[16:40]) == (self.id, number)
        if not whole or salt not in (None, struct.unpack("<Q", data[40:48])[0]):
            if number in self.segments:
                raise Damage(f"{path}: the header is damaged, or another segment's")
            return  # made just before a crash, and never used
        self.data[number], salt, offset = data, struct.unpack("<Q", data[40:48])[0], BLOCK
        while not (is_sealed and offset >= end) and (found := frame(data, offset, salt)) is not None:
            self.commits[found["seq"]] = (number, found)
            self.synced = max(self.synced, found["synced_through"])
            offset = found["payload"] + found["payload_len"]
        if offset < end:
            raise Damage(f"{path} at byte {offset}: a frame that the manifest covers is damaged")
        for later in range(offset, end if is_sealed else len(data), BLOCK):  # past a torn frame: only what was synced then
            self.synced = max(self.synced, (frame(data, later, salt) or {"synced_through": 0})["synced_through"])

    def accepted(self):
        """The sequence numbers of the commits that stand, in order."""
        yield from sorted(seq for seq in self.commits if seq <= self.covered)
        seq = self.covered + 1
        while seq in self.commits and (seq <= self.synced or self.payload_is_whole(*self.commits[seq])):
            yield seq
            seq += 1
        if seq <= self.synced:
            raise Damage(f"commit {seq} was acknowledged, and is damaged or missing")

    def payload_is_whole(self, number, commit):
        puts = (entry for entry in commit["entries"] if entry["kind"] == PUT)
        return commit["flags"] & PAYLOAD_SYNCED or all(self.value(e, *self.place(number, commit, e)) is not None for e in puts)

    def place(self, number, commit, entry):
        return (number, commit["payload"] + entry["offset"]) if entry["kind"] == PUT else (entry["segment"], entry["offset"])

    def value(self, entry, segment, offset):
        """The bytes of a value, verified; or None."""
        data = self.data.get(segment, b"")[offset:offset + entry["length"]]
        return data if len(data) == entry["length"] and crc32(data) == entry["crc"] else None


def main(command, path, out=None):
    store, index = Store(path), []
    if command == "extract":
        os.makedirs(out, exist_ok=True)
    for number, (key, (entry, segment, offset)) in enumerate(sorted(store.values.items()), 1):
        name, dtype = key.decode("utf-8", "backslashreplace"), DTYPES[entry["dtype"]]
        if command == "list":
            print(json.dumps(name, ensure_ascii=False)[1:-1], dtype, entry["shape"], entry["length"], sep="\t")
            continue
        data = store.value(entry, segment, offset)
        if data is None:
            raise Damage(f"the value of {name!r}, at byte {offset} of segment {segment:08}, is damaged")
        index.append({"file": f"{number:06}.bin", "key": name, "dtype": dtype, "shape": entry["shape"]})
        with open(os.path.join(out, index[-1]["file"]), "wb") as file:
            file.write(data)
    if command == "extract":
        with open(os.path.join(out, "index.json"), "w", encoding="utf-8") as file:
            file.write("[\n" + ",\n".join(map(json.dumps, index)) + "\n]\n")


if __name__ == "__main__":
    if [len(sys.argv), *sys.argv[1:2]] not in ([3, "list"], [4, "extract"]):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (Damage, OSError, struct.error, ValueError, IndexError) as error:
        sys.exit(f"reader.py: {error}")
