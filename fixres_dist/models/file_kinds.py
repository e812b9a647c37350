"""What a file given as weights is, by its bytes: a torch or safetensors file, or what people have in its place. No torch."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

from fixres_dist.base.errors import UserError, printable
from fixres_dist.base.small_files import parsed
from fixres_dist.data.class_names import check_header

MOST_UNPACKED = 100  # times the size of a zip file: new weights that somebody has zipped stay below
AGAIN = "Next: download it again"
UNPACK = "Next: unpack it, and give the file inside"
JOIN = (
    "Next: join them, in Python: from glob import glob; from safetensors.torch import load_file, save_file; "
    "save_file({k: v for f in sorted(glob('DIR/*.safetensors')) for k, v in load_file(f).items()}, 'whole.safetensors')"
)
CONVERT = "Accepted: a .safetensors or .pth file with timm's names. Next: convert it where its framework is installed"
# First bytes, what they are the first bytes of, and the next step.
KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Next: git lfs pull, in its repository"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself", "Next: git annex get, in its repository"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", CONVERT),
    (b"\x93NUMPY", "a numpy array", CONVERT),
    (b"GGUF", "a GGUF file", CONVERT),
    (b"\x1f\x8b", "compressed by gzip", UNPACK),
    (b"BZh", "compressed by bzip2", UNPACK),
    (b"\xfd7zXZ", "compressed by xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"%PDF", "a PDF", AGAIN),
    (b"\xff\xd8\xff", "a JPEG picture", AGAIN),
    (b"\x89PNG", "a PNG picture", AGAIN),
)
PAGE = (
    "Next: download it again by the link of the file itself (on the hub: /resolve/ in place of /blob/), or log in first"
)


def kind_of(path: Path) -> str:
    """`safetensors` or `torch`; raises UserError for any other file, with what it is and the next step."""
    with open(path, "rb") as file:
        head = file.read(512)
    size = path.stat().st_size
    if not head:
        raise UserError(f"{path} is empty. {AGAIN}, or copy it once more.")
    for start, what, step in KINDS:
        if head.startswith(start):
            raise UserError(f"{path} is {what}. {step}.")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive. {UNPACK}: tar xf {path}")
    if head.startswith(b"PK"):
        check_zip(path, size)
        return "torch"
    if head[8:9] == b"{" and (path.suffix == ".safetensors" or b"\0" in head[:8]):
        check_safetensors(path, size)
        return "safetensors"
    if text := text_of(head):
        raise UserError(f"{path} is {text}")
    if head[4:8] == b"TFL3":
        raise UserError(f"{path} is a TensorFlow Lite model. {CONVERT}.")
    if path.suffix == ".onnx" or re.match(rb"\x08[\x01-\x14](\x12|\x3a|\x42|\x1a)", head):
        raise UserError(f"{path} is an ONNX model. {CONVERT}; of an export of this program: the run's safetensors.")
    if path.suffix in (".pb", ".index", ".meta", ".ckpt") and not head.startswith(b"\x80"):
        raise UserError(f"{path} is a file of TensorFlow. {CONVERT}.")
    if not head.startswith(b"\x80"):
        raise UserError(
            f"{path} is no weights file: it starts with {head[:12].hex(' ')}. Accepted: safetensors, or what torch.save "
            f"writes. {AGAIN}, and compare its {size:,} bytes with the source's."
        )
    return "torch"  # a pickle, torch's older form


def text_of(head: bytes) -> str:
    """What a text is, with the next step; empty for bytes that are no text."""
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = head.decode("utf-16" if wide else "utf-8-sig", "ignore").strip()
    if not text.startswith("<") and (not head.isascii() or any(not (c.isprintable() or c.isspace()) for c in text)):
        return ""
    start = printable(" ".join(text.split())[:60])
    if text.startswith("<"):
        what = "web page (HTML)" if "html" in text.lower() else "message of a server (XML)"
        return f"a {what}, not weights: {start!r}. {PAGE}."
    if '"weight_map"' in text:
        return f"the list of the pieces of weights that are in several files. {JOIN}."
    if text.startswith(("{", "[")):
        return f"a JSON text, not weights: {start!r}. {PAGE}."
    return f"a text, not weights: {start!r}. {PAGE}."


def check_safetensors(path: Path, size: int) -> None:
    """Raise UserError for a safetensors file whose header is damaged, or which ends before its tensors do."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise UserError(f"{path} ends within its header: {size:,} bytes. {AGAIN}.")
        try:
            check_header(path, length)
        except ValueError as error:
            raise UserError(f"{path} is no safetensors file: {error}. {AGAIN}.") from None
        try:
            entries = parsed(file.read(length).decode())
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{path} is a safetensors file whose header is damaged. {AGAIN}.") from None
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise UserError(f"{path} is cut off: {size:,} bytes of {whole:,}. {AGAIN}.")
    if not ends:
        raise UserError(f"{path} is a safetensors file without a tensor. Accepted: a model's state dict.")


def check_zip(path: Path, size: int) -> None:
    """Raise UserError for a zip file that torch.save has not written, or that ends early."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
            if (unpacked := sum(entry.file_size for entry in file.infolist())) > MOST_UNPACKED * size:
                raise UserError(
                    f"{path} has {size:,} bytes and says that it unpacks to {unpacked:,}. Accepted: {MOST_UNPACKED} times its "
                    "size; torch.save does not compress."
                )
            damaged = damaged_member(file)
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error):
        raise UserError(
            f"{path} is cut off or damaged: a file of torch.save, or another zip, of {size:,} bytes without its end. {AGAIN}."
        ) from None
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} in it is not that of its bytes. {AGAIN}.")
    inside = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in inside or any("/code/" in name for name in names):
        step = 'Next: model = torch.jit.load(FILE); torch.save(model.state_dict(), "weights.pth")'
        raise UserError(f"{path} is a TorchScript model, which is code. {step}, and give that file.")
    if "data.pkl" in inside:
        return
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} holds numpy arrays (npz: {', '.join(names[:2])} ..). {CONVERT}.")
    if "archive_format" in inside or "serialized_exported_program.json" in inside:
        raise UserError(
            f"{path} is a program of torch.export. Next: save its state_dict with torch.save, and give that file."
        )
    listed = ", ".join(names[:3]) or "nothing"
    raise UserError(f"{path} is a zip archive without a state dict (in it: {listed}). {UNPACK}.")


def damaged_member(file: zipfile.ZipFile) -> str | None:
    """The first member whose bytes do not have their CRC-32: torch's reader does not look. All are 0 where torch was told
    to leave them out (torch.serialization.set_crc32_options)."""
    return file.testzip() if any(member.CRC for member in file.infolist()) else None
