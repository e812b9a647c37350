"""Checksums that somebody has put beside a shard, as md5sum, sha256sum and their like write them. No torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from fixres_dist.base.commands import shell
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import lines_of

KINDS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}  # by the number of hex digits
LISTS = re.compile(r"(?i)((md5|sha1|sha256|sha512)(sums?)?|checksums?)(\.(txt|md5|sha1|sha256|sha512))?")
LINE = re.compile(r"\\?(?P<digest>[0-9a-fA-F]{32,128})([ \t]+\*?(?P<name>.+))?")  # of GNU's programs
BSD = re.compile(r"(MD5|SHA1|SHA256|SHA512) ?\((?P<name>.+)\) ?= ?(?P<digest>[0-9a-fA-F]{32,128})")


def compare(shard: Path) -> None:
    """Read the whole `shard` and compare it, if a file beside it has its checksum. Raises UserError where they differ, or a
    file cannot be read."""
    try:
        for source, given in checksums_of(shard):
            with open(shard, "rb") as file:
                found = hashlib.file_digest(file, KINDS[len(given)]).hexdigest()
            if found != given.lower():
                raise UserError(
                    f"{shard} is damaged, or was changed: its {KINDS[len(given)]} is {found}, and {source} has {given}. Next: "
                    f"copy it again; or, if it was changed on purpose, write the list again, or {shell('rm', source)}"
                )
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or shard}: {error.strerror or error}. Accepted: a file this user may read."
        ) from None


def checksums_of(shard: Path) -> Iterator[tuple[Path, str]]:
    """(file, hex digest) of each list beside `shard` that names it, and of files of its own such as 000000.tar.sha256."""
    own = {f"{stem}.{kind}" for stem in (shard.name, shard.stem) for kind in KINDS.values()}
    for source in sorted(shard.parent.iterdir()):
        if source.name in own or LISTS.fullmatch(source.name):
            for line in lines_of(source):
                found = LINE.fullmatch(line) or BSD.fullmatch(line)
                named = found and (found["name"] or (shard.name if source.name in own else ""))
                if found and named and Path(named).name == shard.name and len(found["digest"]) in KINDS:
                    yield source, found["digest"]
