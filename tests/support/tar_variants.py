"""Tar archives that no library writes: fifty variants of archive headers.

Each variant is the bytes of an archive; the expected content is what tar(1) extracts.
"""

from tinkerfs.demo.content import Concat, Data, Noise

BLOCK = 512
END = bytes(2 * BLOCK)
EPOCH = 1_700_000_000

REG, OLD, LINK, SYM, CHR, FIFO, DIR, CONT = b"0", b"\0", b"1", b"2", b"3", b"6", b"5", b"7"


def octal(number, width):
    return f"{number:0{width - 1}o}".encode() + b"\0"


def base256(number, width):
    return bytes([0x80]) + number.to_bytes(width - 1, "big")


def header(
    name,
    size=0,
    kind=REG,
    target=b"",
    *,
    magic=b"ustar\x0000",
    prefix=b"",
    mtime=EPOCH,
    size_field=None,
    mtime_field=None,
    checksum=None,
):
    """One header block; `name`, `target` and `prefix` as bytes."""
    block = bytearray(BLOCK)
    fields = (
        (0, name),
        (100, b"0000644\0"),
        (108, b"0000000\0"),
        (116, b"0000000\0"),
        (124, octal(size, 12) if size_field is None else size_field),
        (136, octal(mtime, 12) if mtime_field is None else mtime_field),
        (148, b" " * 8),
        (156, kind),
        (157, target),
        (257, magic),
        (345, prefix),
    )
    for at, value in fields:
        block[at : at + len(value)] = value
    total = sum(block) if checksum is None else checksum(block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def member(name, data=b"", kind=REG, **fields):
    return header(name, len(data), kind, **fields) + padded(data)


def link(name, target, **fields):
    return header(name, 0, LINK, target, **fields)


def symlink(name, target, **fields):
    return header(name, 0, SYM, target, **fields)


def directory(name, **fields):
    return header(name, 0, DIR, **fields)


def pax_records(records):
    lines = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        total = length + len(str(length))
        total = length + len(str(total))
        lines += b"%d %b=%b\n" % (total, key, value)
    return lines


def pax(*records, kind=b"x"):
    return member(b"./PaxHeaders/x", pax_records(records), kind)


def gnu_long(value, kind=b"L"):
    return member(b"././@LongLink", value + b"\0", kind, magic=b"ustar  \0")


def signed_sum(block):
    return sum(byte - 256 if byte > 127 else byte for byte in block)


def sparse(pieces=b"512,512,1048064,512"):
    """A sparse file of 1 MiB in the pax form 0.1."""
    return pax(
        (b"GNU.sparse.major", b"0"),
        (b"GNU.sparse.minor", b"1"),
        (b"GNU.sparse.name", b"holes"),
        (b"GNU.sparse.size", b"1048576"),
        (b"GNU.sparse.numblocks", b"2"),
        (b"GNU.sparse.map", pieces),
    ) + member(b"GNUSparseFile.0/holes", b"1" * 512 + b"2" * 512)


LARGE_BYTES = 9 << 30


def large(form, *, has_end=True):
    """Return a tar with a generated file of 9 GiB; its header has the size in the given `form`."""
    if form == "pax":
        start = pax((b"size", b"%d" % LARGE_BYTES)) + header(b"large")
    else:
        start = header(b"large", 0, size_field=base256(LARGE_BYTES, 12), **GNU)
    end = member(b"z", b"last one") + (END if has_end else b"")
    return Concat([Data(start), Noise(LARGE_BYTES, 7), Data(end)])


LONG = b"/".join([b"folder" * 15] * 4) + b"/file"
V7 = {"magic": b"\0" * 8}
GNU = {"magic": b"ustar  \0"}
A = member(b"a", b"first")
Z = member(b"z", b"last one")

#: What tar(1) extracts whole: each has `z`, so that a reader that lost its way is found out.
VARIANTS = {
    "v7": member(b"a", b"first", OLD, **V7) + Z + END,
    "v7 with a directory by its slash": member(b"d/", b"", OLD, **V7)
    + member(b"d/a", b"first", OLD, **V7)
    + Z
    + END,
    "ustar": A + Z + END,
    "ustar prefix": member(b"file", b"far", prefix=b"one/two/three") + Z + END,
    "ustar prefix of 155 bytes": member(b"f" * 100, b"far", prefix=b"p" * 155) + Z + END,
    "gnu header takes no prefix": member(b"file", b"near", prefix=b"00000000000", **GNU) + Z + END,
    "name that fills its field": member(b"n" * 100, b"full") + Z + END,
    "contiguous type": member(b"a", b"first", CONT) + Z + END,
    "unknown type is a file": member(b"a", b"first", b"Q") + Z + END,
    "pax path": pax((b"path", b"other/name")) + A + Z + END,
    "pax path with a newline": pax((b"path", b"new\nline")) + A + Z + END,
    "pax path that ends in a slash": pax((b"path", b"d/")) + member(b"a") + Z + END,
    "pax path of bytes": pax((b"hdrcharset", b"BINARY"), (b"path", b"caf\xe9")) + A + Z + END,
    "pax size": pax((b"size", b"5")) + header(b"a", 0) + padded(b"first") + Z + END,
    "pax size over another": pax((b"size", b"5")) + header(b"a", 4096) + padded(b"first") + Z + END,
    "pax mtime": pax((b"mtime", b"1234567890.25")) + A + Z + END,
    "pax linkpath": A + pax((b"linkpath", b"a")) + link(b"b", b"nothing") + Z + END,
    "pax unknown keys": pax((b"SCHILY.xattr.user.x", b"\xff\0="), (b"ctime", b"1")) + A + Z + END,
    "pax comment with an equals sign": pax((b"comment", b"a=b=c")) + A + Z + END,
    "pax global comment": pax((b"comment", b"0123456789"), kind=b"g") + A + Z + END,
    "pax global mtime": pax((b"mtime", b"1234567890"), kind=b"g") + A + Z + END,
    "pax global, then its own": pax((b"mtime", b"1"), kind=b"g")
    + pax((b"mtime", b"2"))
    + A
    + Z
    + END,
    "pax path and sparse": sparse() + Z + END,
    "gnu long name": gnu_long(LONG) + member(LONG[:100], b"deep", **GNU) + Z + END,
    "gnu long link": member(b"a", b"first", **GNU)
    + gnu_long(b"./" * 80 + b"a", b"K")
    + symlink(b"s", b"./" * 50, **GNU)
    + Z
    + END,
    "gnu long link and name": member(b"a", b"first", **GNU)
    + gnu_long(b"./" * 80 + b"a", b"K")
    + gnu_long(LONG)
    + link(b"x", b"x", **GNU)
    + Z
    + END,
    "gnu volume label": header(b"label", 0, b"V", **GNU) + A + Z + END,
    "base-256 size": header(b"a", 5, size_field=base256(5, 12), **GNU) + padded(b"first") + Z + END,
    "base-256 mtime": header(b"a", 5, mtime_field=base256(EPOCH, 12), **GNU)
    + padded(b"first")
    + Z
    + END,
    "size with spaces around": header(b"a", 5, size_field=b"         5 \0")
    + padded(b"first")
    + Z
    + END,
    "size without an end": header(b"a", 5, size_field=b"000000000005") + padded(b"first") + Z + END,
    "signed checksum": header(b"caf\xe9", 5, checksum=signed_sum) + padded(b"first") + Z + END,
    "hard link": A + link(b"b", b"a") + Z + END,
    "hard link chain": A + link(b"b", b"a") + link(b"c", b"b") + Z + END,
    "hard link before its target": link(b"b", b"a") + A + Z + END,
    "hard link to itself": A + link(b"a", b"a") + Z + END,
    "hard link over a file": A + member(b"b", b"old") + link(b"b", b"a") + Z + END,
    "hard link, then its target again": A + link(b"b", b"a") + member(b"a", b"second") + Z + END,
    "hard link to a symbolic link": A + symlink(b"s", b"a") + link(b"h", b"s") + Z + END,
    "hard link to a symbolic link with a reused name": A
    + symlink(b"s", b"a")
    + link(b"h", b"s")
    + member(b"s", b"new")
    + Z
    + END,
    "hard link elsewhere to a symbolic link": A
    + member(b"d/a", b"inner")
    + symlink(b"s", b"a")
    + link(b"d/h", b"s")
    + Z
    + END,
    "hard link to a directory": directory(b"d/") + link(b"h", b"d") + Z + END,
    "hard link with a size": A + header(b"b", 5, LINK, b"a") + Z + END,
    "symbolic link": A + symlink(b"s", b"a") + Z + END,
    "symbolic link before its target": symlink(b"s", b"a") + A + Z + END,
    "symbolic link up": A + symlink(b"d/s", b"../a") + Z + END,
    "symbolic link chain": symlink(b"s", b"t") + symlink(b"t", b"a") + A + Z + END,
    "symbolic link out": symlink(b"d", b"../elsewhere") + member(b"d/f", b"x") + Z + END,
    "symbolic link to the root": symlink(b"d", b"/nothing") + member(b"d/f", b"x") + Z + END,
    "symbolic link up, and a file below it": directory(b"x/")
    + symlink(b"d", b"y/../x")
    + directory(b"y/")
    + member(b"d/f", b"x")
    + Z
    + END,
    "hard link to a symbolic link up": A
    + symlink(b"s", b"y/../a")
    + directory(b"y/")
    + link(b"h", b"s")
    + Z
    + END,
    "symbolic link round": symlink(b"s", b"t") + symlink(b"t", b"s") + A + Z + END,
    "symbolic link over a file": member(b"b", b"old") + A + symlink(b"b", b"a") + Z + END,
    "file over a symbolic link": A + symlink(b"s", b"a") + member(b"s", b"own") + Z + END,
    "file below a symbolic link": directory(b"real/")
    + member(b"real/f", b"old")
    + symlink(b"d", b"real")
    + member(b"d/f", b"new")
    + Z
    + END,
    "file below a symbolic link to nothing": symlink(b"d", b"real")
    + member(b"d/f", b"x")
    + Z
    + END,
    "symbolic link through a symbolic link": member(b"real/f", b"data")
    + symlink(b"d", b"real")
    + symlink(b"s", b"d/f")
    + Z
    + END,
    "symbolic link up through a symbolic link": member(b"x/real/f", b"data")
    + member(b"x/a", b"inner")
    + A
    + symlink(b"d", b"x/real")
    + symlink(b"s", b"d/../a")
    + Z
    + END,
    "hard link through a symbolic link": member(b"real/f", b"data")
    + symlink(b"d", b"real")
    + link(b"h", b"d/f")
    + Z
    + END,
    "two of one name": A + member(b"a", b"second") + Z + END,
    "two of one name by a dot": A + member(b"./a", b"second") + Z + END,
    "two of one name by slashes": member(b"d/a", b"1") + member(b"d//a", b"second") + Z + END,
    "dot and its directory": directory(b"./") + member(b"./a", b"first") + Z + END,
    "dots between": member(b"d/./a", b"first") + Z + END,
    "directory as a file by its slash": member(b"d/a/", b"", REG) + Z + END,
    "directory as a file by its slash, and a file below": member(b"d/a/", b"", REG)
    + member(b"d/a/b", b"x")
    + Z
    + END,
    "directory as a file by its slash, with bytes": member(b"d/a/", b"bytes", REG) + Z + END,
    "symbolic link with a size": A + header(b"s", 5, SYM, b"a") + Z + END,
    "directory with a size": header(b"d", 5, DIR) + Z + END,
    "old directory by its slash, with a size": header(b"d/", 5, OLD, **V7) + Z + END,
    "dumpdir": member(b"d", b"Yname\0\0", b"D", **GNU) + Z + END,
    "contiguous directory by its slash": member(b"d/", b"", CONT) + Z + END,
    "file, then a directory of its name": member(b"d", b"x") + directory(b"d/") + Z + END,
    "file, then a file below it": member(b"d", b"x") + member(b"d/a", b"y") + Z + END,
    "directory, then a file of its name": directory(b"d/") + member(b"d", b"x") + Z + END,
    "full directory, then a file of its name": member(b"d/a", b"y") + member(b"d", b"x") + Z + END,
    "symbolic link, then a directory of its name": member(b"real/f", b"1")
    + symlink(b"d", b"real")
    + directory(b"d/")
    + member(b"d/f", b"2")
    + Z
    + END,
    "symbolic link with a slash": A + symlink(b"s/", b"a") + Z + END,
    "device and pipe": header(b"null", 0, CHR) + header(b"pipe", 0, FIFO) + Z + END,
    "hard link to a pipe": header(b"pipe", 0, FIFO) + link(b"h", b"pipe") + Z + END,
    "file over a pipe": header(b"pipe", 0, FIFO) + member(b"pipe", b"x") + Z + END,
    "empty file": member(b"a", b"") + Z + END,
    "file of a whole block": member(b"a", b"x" * BLOCK) + Z + END,
    "mtime that is not a number": header(b"a", 5, mtime_field=b" " * 12)
    + padded(b"first")
    + Z
    + END,
    "negative mtime": header(b"a", 5, mtime_field=b"\xff" * 11 + b"\xfe", **GNU)
    + padded(b"first")
    + Z
    + END,
    "ends without its blocks": A + Z,
    "ends with one block": A + Z + bytes(BLOCK),
    "blocks after the end": A + Z + END + bytes(20 * BLOCK),
    "noise after the end": A + Z + END + b"noise" * 1000,
    "part of a block after the end": A + Z + END + b"noise",
    "an archive after the end": A + Z + END + member(b"z", b"another") + END,
    "a member after a lone zero block": A + Z + bytes(BLOCK) + member(b"z", b"another") + END,
}
#: What is damaged: tar(1) fails.
DAMAGED = {
    "nothing": b"",
    "zeros": bytes(20 * BLOCK),
    "cut within a member": (A + member(b"z", b"x" * 2000))[:-BLOCK],
    "cut within a member's padding": (A + Z)[:-100],
    "cut within a header": (A + Z)[: -BLOCK - 100],
    "cut after a header": (A + Z)[:-BLOCK],
    "cut after a long name": A + gnu_long(LONG),
    "cut within a long name": (A + gnu_long(LONG))[:-BLOCK],
    "cut after a pax header": A + pax((b"path", b"x")),
    "cut within a pax header": (A + pax((b"path", b"x" * 2000)))[:-BLOCK],
    "a header with another checksum": A + header(b"z", 0, checksum=lambda _block: 7) + Z + END,
    "noise between members": A + b"noise".ljust(BLOCK, b"\xff") + Z + END,
    "a size beyond the end": A + header(b"z", 1 << 30) + padded(b"short") + END,
    "a size that is not a number": A
    + header(b"z", 5, size_field=b"five\0")
    + padded(b"five!")
    + END,
    "a pax size that is not a number": pax((b"size", b"five")) + A + Z + END,
    "a pax length that lies": member(b"./Pax", b"99 path=x\n", b"x") + A + Z + END,
}
#: What tar(1) reads, and its readers each otherwise: shown by none.
REFUSED = {
    "two pax headers of one member": pax((b"path", b"one")) + pax((b"path", b"two")) + A + Z + END,
    "a size in a global pax header": pax((b"size", b"5"), kind=b"g") + A + Z + END,
    "a sparse piece that begins within a block": sparse(b"512,5,1048571,5") + Z + END,
    "a name with a NUL": pax((b"path", b"a\0b")) + A + Z + END,
}
