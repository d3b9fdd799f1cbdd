#!/usr/bin/env python3
"""Reads an alight store by SPEC.md alone: no Rust, nothing but Python 3.9 and its standard library.

    reader.py list STORE              one line for each key: key, dtype, shape, bytes
    reader.py extract STORE OUTDIR    each value into a file of its own, and OUTDIR/index.json to say which

Replays the commits in the segments and ignores the index. Writes nothing into the store. Exits with 1 on damage.
"""
import json, mmap, re, struct, sys
from pathlib import Path
from zlib import crc32

BLOCK, PAYLOAD_SYNCED, PUT, DELETE = 4096, 1, 1, 2
DTYPES = ("none BOOL U8 I8 U16 I16 U32 I32 U64 I64 F16 BF16 F32 F64 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ "
          "C64 C128 F4 F6_E2M3 F6_E3M2").split()
PRELUDE = "salt offset seq frame_len payload_len synced_through body_len entries flags previous part parts".split()
Damage = ValueError  # whatever is wrong with the bytes


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
        found = {"key": self.string(), "kind": self.take("B"), "dtype": DTYPES[self.take("B")]}
        found["name"] = found["key"].decode("utf-8", "backslashreplace")
        found["shape"] = self.list(lambda: self.take("Q"))
        found["attributes"] = self.list(lambda: (self.string().decode(), self.string()))
        found["segment"], found["offset"], found["length"], found["crc"] = self.take("QQQI")
        found["chunk_crcs"], (_, found["origin"]) = self.list(lambda: self.take("I")), self.take("QQ")
        return found


def sealed(data, magic):
    """Whether these bytes begin with this magic and end with the CRC-32 of all before."""
    return len(data) > 12 and data[:8] == magic and crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0]


def frame(data, offset, salt):
    """The frame that begins at this offset of this segment, whole and verified; or None."""
    if not sealed(head := data[offset:offset + 96], b"ALIGHTfr") or len(head) < 96:
        return None
    found = dict(zip(PRELUDE, struct.unpack_from("<QQQQQQQIIIHH", head, 8)))
    whole = data[offset:offset + found["frame_len"]]
    if (found["salt"], found["offset"], found["frame_len"]) != (salt, offset, len(whole)) or not sealed(whole, head[:8]):
        return None
    if found["parts"] != 1:
        raise Damage("a commit is striped over several directories, which this reader cannot join")
    body = Body(whole[96:96 + found["body_len"]])
    return {**found, "entries": body.list(body.entry), "payload": offset + found["frame_len"]}


class Store:
    """The accepted state of a store: for each key its newest entry, and where its value lies."""
    def __init__(self, path):
        if (path / "UNFINISHED").exists():
            raise Damage(f"{path}: a store that is still being made from another one")
        self.read_manifest(path / "MANIFEST")
        self.data, self.commits, self.synced, self.values = {}, {}, self.covered, {}
        found = {int(file.stem) for file in (path / "segments").iterdir() if re.fullmatch(r"\d{8,}\.seg", file.name)}
        for number in sorted({number for number in found if number >= self.next_segment} | set(self.segments)):
            self.read_segment(number, path / "segments" / f"{number:08}.seg")
        for seq, entry in ((seq, entry) for seq in self.accepted() for entry in self.commits[seq]["entries"]):
            entry["seq"] = entry["origin"] or seq  # what compaction moved is as old as ever
            self.values[entry["key"]] = max(self.values.get(entry["key"], entry), entry, key=lambda e: (e["seq"], e is entry))
        self.values = [entry for _, entry in sorted(self.values.items()) if entry["kind"] != DELETE]

    def read_manifest(self, path):
        data = path.read_bytes()
        if not sealed(data[:64], b"ALIGHTmf"):
            raise Damage(f"{path}: the head is damaged, or this is no alight store")
        if struct.unpack_from("<I20xQ", data, 8) != (1, 0):
            raise Damage(f"{path}: a newer reader is needed, for its version or its incompatible features")
        if not sealed(data, b"ALIGHTmf"):
            raise Damage(f"{path}: wrong checksum")
        body = Body(data[64:-4])
        self.id, self.covered, self.next_segment, _, _ = body.take("16sQQQQ")
        self.segments = {record[0]: record for record in body.list(lambda: body.take("QQQIBQQQQQQQ"))}

    def read_segment(self, number, path):
        _, salt, end, _, is_sealed, *_ = self.segments.get(number, (number, None, BLOCK, 0, 0))
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        header = struct.unpack("<16sQQ", data[16:48]) if sealed(data[:BLOCK], b"ALIGHTsg") else (None, None, None)
        if header[:2] != (self.id, number) or salt not in (None, header[2]):
            if number in self.segments:
                raise Damage(f"{path}: the header is damaged, or another segment's")
            return  # made just before a crash, and never used
        self.data[number], salt, offset = data, header[2], BLOCK
        while not (is_sealed and offset >= end) and (found := frame(data, offset, salt)) is not None:
            for entry in (entry for entry in found["entries"] if entry["kind"] == PUT):  # others say where, themselves
                entry["segment"], entry["offset"] = number, found["payload"] + entry["offset"]
            self.commits[found["seq"]], self.synced = found, max(self.synced, found["synced_through"])
            offset = found["payload"] + found["payload_len"]
        if offset < end:
            raise Damage(f"{path} at byte {offset}: a frame that the manifest covers is damaged")
        for later in range(offset, end if is_sealed else len(data), BLOCK):  # past a torn frame: only what was synced then
            self.synced = max(self.synced, (frame(data, later, salt) or {"synced_through": 0})["synced_through"])

    def accepted(self):
        """The sequence numbers of the commits that stand, in order."""
        yield from sorted(seq for seq in self.commits if seq <= self.covered)
        seq = self.covered + 1
        while seq in self.commits and (seq <= self.synced or self.is_whole(self.commits[seq])):
            yield seq
            seq += 1
        if seq <= self.synced:
            raise Damage(f"commit {seq} was acknowledged, and is damaged or missing")

    def is_whole(self, commit):
        return commit["flags"] & PAYLOAD_SYNCED or None not in (self.value(e) for e in commit["entries"] if e["kind"] == PUT)

    def value(self, entry):
        """The bytes of a value, verified; or None."""
        data = self.data.get(entry["segment"], b"")[entry["offset"]:entry["offset"] + entry["length"]]
        return data if len(data) == entry["length"] and crc32(data) == entry["crc"] else None


def listed(store):
    for entry in store.values:
        print(json.dumps(entry["name"], ensure_ascii=False)[1:-1], *map(entry.get, ("dtype", "shape", "length")), sep="\t")


def extracted(store, out):
    index = []
    out.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(store.values, 1):
        if (data := store.value(entry)) is None:
            raise Damage("the value of {name!r}, at byte {offset} of segment {segment:08}, is damaged".format(**entry))
        index.append({"file": f"{number:06}.bin", "key": entry["name"], "dtype": entry["dtype"], "shape": entry["shape"]})
        (out / index[-1]["file"]).write_bytes(data)
    (out / "index.json").write_text("[\n" + ",\n".join(map(json.dumps, index)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    if [len(sys.argv), *sys.argv[1:2]] not in ([3, "list"], [4, "extract"]):
        sys.exit(__doc__)
    try:
        {"list": listed, "extract": extracted}[sys.argv[1]](Store(Path(sys.argv[2])), *map(Path, sys.argv[3:]))
    except (Damage, OSError, struct.error, IndexError) as error:
        sys.exit(f"reader.py: {error}")
