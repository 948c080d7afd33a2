"""Disks that are full or take no writes, where the account that runs the tests may make them."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


def _run(*command: str | Path) -> None:
    """Skips the test where this is not allowed."""
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{command[0]} is not to be had here: {error}")


@contextmanager
def small_disk(folder: Path, megabytes: int, *, owner: int = 0) -> Iterator[Path]:
    """A disk of its own at `folder`, which belongs to that account."""
    folder.mkdir(parents=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m,uid={owner},mode=700", "none", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Takes all that is left; gives the file that has it."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


@contextmanager
def unwritable(*files: Path) -> Iterator[None]:
    """Not even root writes to these files, nor does who has them open: as on a disk that has become read-only."""
    _run("chattr", "+i", *files)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", *files], check=True)
