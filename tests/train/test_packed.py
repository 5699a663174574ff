import numpy as np

from train.packed import PackedFiles, empty_files


def pack(*files: bytes) -> PackedFiles:
    sizes = np.array([len(file) for file in files], np.int64)
    ends = np.cumsum(sizes)
    return PackedFiles(np.frombuffer(b"".join(files), np.uint8), ends - sizes, ends)


def unpack(files: PackedFiles) -> list[bytes]:
    return [files[row] for row in range(len(files))]


def test_files_are_joined_and_left_out_by_row() -> None:
    files = pack(b"one", b"", b"three") + pack(b"four")
    assert unpack(files) == [b"one", b"", b"three", b"four"]
    assert files.is_empty.tolist() == [False, True, False, False]
    assert unpack(files.without([0, 2])) == [b"", b"four"]


def test_empty_files_join_with_others() -> None:
    assert unpack(empty_files(2) + pack(b"one")) == [b"", b"", b"one"]


def test_the_digest_is_of_each_files_bytes() -> None:
    files = [pack(b"ab", b"c"), pack(b"a", b"bc"), pack(b"ab", b"d"), pack(b"ab"), empty_files(2)]
    assert len({each.digest() for each in files}) == len(files)
    assert pack(b"ab", b"c").digest() == files[0].digest()
