"""What is found wrong with a file before the loader sees it, which chips an architecture list serves, fingerprints."""

import json
import platform
import struct
import zlib
from pathlib import Path

import pytest
import torch

import fused_ops
from fused_ops.core import extension, verified
from fused_ops.core.device import runs_on
from fused_ops.core.extension import TRAILER, _promised_size, damage

KERNELS = Path(fused_ops.__file__).parent / "_C.so"


def with_trailer(body: bytes) -> bytes:
    return body + TRAILER + json.dumps({"crc32": zlib.crc32(body), "sources": {"a.cu": "0" * 64}}).encode()


@pytest.fixture(scope="module")
def body():
    """A whole shared library of this machine: torch's own Python module, without what may follow its last segment."""
    data = Path(torch._C.__file__).read_bytes()
    return data[: _promised_size(data)]


@pytest.fixture(scope="module")
def library(body):
    return with_trailer(body)


def test_a_whole_library_is_accepted_with_or_without_a_trailer(body, library):
    assert damage(body) is None
    assert damage(library) is None


@pytest.mark.skipif(not KERNELS.exists(), reason="_C.so was not built")
def test_the_installed_library_is_whole_and_was_loaded():
    assert damage(KERNELS.read_bytes()) is None
    assert extension.kernels_missing is None
    assert all(len(digest) == 64 for digest in extension.sources.values())


def test_truncation_is_found_at_every_length(body):
    for length in (0, 1, 4, 5, 63, 64, 65, 4096, *range(0, len(body), len(body) // 97), len(body) - 1):
        assert damage(body[:length]), length


def test_truncation_inside_the_trailer_is_found(body, library):
    for length in range(len(body) + len(TRAILER), len(library)):
        assert damage(library[:length]), length
    # Less than the mark is no trailer: what precedes it is a whole library.
    assert damage(library[: len(body) + len(TRAILER) - 1]) is None


def test_a_changed_byte_is_found(body, library):
    for position in (0, 4, 18, 46, 64, len(body) // 2, len(body) - 1, library.index(b"crc32") + 9):
        changed = bytearray(library)
        changed[position] ^= 0x01
        assert damage(bytes(changed)), position


@pytest.mark.parametrize("tail", [b"", b"{", b"[]", b"3", b"{}", b'{"crc32": "x"}', b"\xff\xfe"])
def test_an_unreadable_trailer_is_damage(body, tail):
    assert "corrupt" in damage(body + TRAILER + tail)


def test_another_machine_is_named(body):
    foreign = 183 if platform.machine() == "x86_64" else 62
    found = damage(body[:18] + struct.pack("<H", foreign) + body[20:])
    assert "another processor" in found and str(foreign) in found


@pytest.mark.parametrize(
    "data",
    [b"", b"\x7fELF", b"\x7fELF\x01" + b"\0" * 99, b"MZ" + b"\0" * 99, b"version https://git-lfs.github.com/\n" * 9],
    ids=["empty", "magic", "32-bit", "windows", "lfs pointer"],
)  # fmt: skip
def test_what_is_no_64_bit_elf_file_is_named(data):
    assert damage(data) == "not a 64-bit ELF file"


@pytest.mark.parametrize(
    ("chip", "arch_list", "runs"),
    [
        ((8, 0), "8.0", True),
        ((8, 9), "8.0", True),
        ((8, 6), "8.9", False),
        ((9, 0), "8.0;8.6;8.9", False),
        ((9, 0), "8.0;9.0a", True),
        ((9, 0), "8.0 9.0", True),
        ((10, 0), "9.0a", False),
        ((10, 0), "9.0", False),
        ((10, 0), "9.0+PTX", True),
        ((10, 0), "9.0a+PTX", False),
        ((12, 0), "8.0+PTX", True),
        ((7, 5), "8.0+PTX", False),
        ((10, 3), "10.0", True),
        ((10, 3), "10.0a", False),
        ((10, 3), "10.0f", True),
        ((12, 1), "12.0f", True),
        ((12, 0), "10.0f", False),
        ((12, 0), "8.0;8.6;8.9;9.0a;10.0;12.0+PTX", True),
        ((9, 0), "", False),
    ],
)
def test_which_chips_an_architecture_list_serves(chip, arch_list, runs):
    assert runs_on(chip, arch_list) is runs


@pytest.fixture
def two_sources(monkeypatch, tmp_path):
    """A kernel of one Python file and one C++ file, and a way to change either."""
    monkeypatch.setattr(verified, "KERNELS", dict(verified.KERNELS))
    monkeypatch.setattr(verified, "_record", {})
    source = tmp_path / "kernels.py"
    source.write_text("original")
    monkeypatch.setattr(extension, "sources", {"test/kernel.cu": "a" * 64})

    def fresh():
        monkeypatch.setattr(verified, "_fingerprints", {})
        return verified.kernel("test.two", str(source), "test/kernel.cu")

    return fresh, source


def test_a_fingerprint_follows_every_source(two_sources, monkeypatch):
    fresh, source = two_sources
    original = verified.fingerprint(fresh())
    assert original == verified.fingerprint(fresh())
    source.write_text("changed")
    changed = verified.fingerprint(fresh())
    monkeypatch.setattr(extension, "sources", {"test/kernel.cu": "b" * 64})
    both = verified.fingerprint(fresh())
    assert len({original, changed, both}) == 3


def test_a_kernel_is_experimental_until_recorded_and_after_any_change(two_sources, monkeypatch):
    fresh, source = two_sources
    kernel = fresh()
    assert verified.experimental("test.two")
    monkeypatch.setattr(verified, "_record", {"test.two": {"fingerprint": verified.fingerprint(kernel)}})
    assert not verified.experimental("test.two")
    source.write_text("changed")
    fresh()
    assert verified.experimental("test.two")


@pytest.mark.parametrize("fingerprint", [None, "", "0" * 64])
def test_a_kernel_whose_source_is_not_installed_is_experimental_whatever_the_record_says(
    two_sources, monkeypatch, fingerprint
):
    fresh, source = two_sources
    monkeypatch.setattr(extension, "sources", {})
    assert verified.fingerprint(fresh()) is None
    monkeypatch.setattr(verified, "_record", {"test.two": {"fingerprint": fingerprint}})
    assert verified.experimental("test.two")
    monkeypatch.setattr(extension, "sources", {"test/kernel.cu": "a" * 64})
    source.unlink()
    fresh()
    assert verified.experimental("test.two")
