"""A SLURM of a later Debian in a folder of its own, beside the one that is installed.

    python tests/slurm/newer.py [FOLDER]      # by default $LUNARIS_NEWER_SLURM, or build/slurm

Downloads the packages of SLURM and the libraries that they need from Debian's archive, compares
their checksums with the archive's index, unpacks them into FOLDER, and lets every program find its
libraries there (`patchelf`). Nothing of the system is changed, and root is not needed.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

MIRROR = "http://deb.debian.org/debian"
SUITE = "trixie"
_PROGRAMS = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins")
# What a package may need besides libraries is not needed here: no service is installed.
_LIBRARY = re.compile(r"lib[a-z0-9].*|slurm.*")
_BASE = re.compile(r"lib(perl|systemd-shared).*|lib.*-(bin|data|dev|modules.*)")
Index = dict[str, dict[str, str]]


def default_folder() -> Path:
    """Return the folder in which the tests look for it."""
    own = Path(__file__).parents[2] / "build" / "slurm"
    return Path(os.environ.get("LUNARIS_NEWER_SLURM") or own)


def main(argv: list[str]) -> int:
    """Unpack it; print its version. Raises RuntimeError for a file with another checksum."""
    folder = Path(argv[0]).absolute() if argv else default_folder()
    done = folder / "complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        index = _read_index()
        for name in sorted(_closure(index)):
            _unpack(index[name], folder)
        for file in list(_programs_and_libraries(folder)):
            _relocate(file, folder)
        for daemon in ("slurmctld", "slurmd", "slurmstepd"):
            (folder / "usr/sbin" / daemon).symlink_to(f"{daemon}-wlm")
        done.write_text(index["slurmctld"]["Version"])
    print(f"newer SLURM: {done.read_text()} in {folder}")
    return 0


def _read_index() -> Index:
    """Return the entries of the archive's packages by their names."""
    packed = _download(f"dists/{SUITE}/main/binary-amd64/Packages.xz")
    found: Index = {}
    for paragraph in lzma.decompress(packed).decode().split("\n\n"):
        lines = [line.partition(": ") for line in paragraph.splitlines() if line[:1] != " "]
        entry = {key: value for key, _, value in lines}
        if "Package" in entry:
            found[entry["Package"]] = entry
    return found


def _closure(index: Index) -> set[str]:
    """Return the packages of SLURM and, of all that they need, the libraries."""
    found: set[str] = set()
    waiting = list(_PROGRAMS)
    while waiting:
        name = waiting.pop()
        if name in found or name not in index or _BASE.fullmatch(name):
            continue
        found.add(name)
        for part in index[name].get("Depends", "").split(","):
            needed = part.partition("|")[0].split()
            if needed and _LIBRARY.fullmatch(needed[0]):
                waiting.append(needed[0].partition(":")[0])
    return found


def _unpack(entry: dict[str, str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    package = _download(entry["Filename"])
    if hashlib.sha256(package).hexdigest() != entry["SHA256"]:
        raise RuntimeError(f"{entry['Filename']}: its checksum is not that of the archive's index")
    file = folder / "package.deb"
    file.write_bytes(package)
    # Debian's libraries lie in /usr/lib, which /lib points to.
    subprocess.run(["dpkg-deb", "-x", str(file), str(folder)], check=True)
    file.unlink()


def _programs_and_libraries(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as opened:
                if opened.read(4) == b"\x7fELF":
                    yield file


def _relocate(file: Path, folder: Path) -> None:
    """Let a program or a library find its loader and its libraries in the folder."""
    libraries = folder / "usr/lib/x86_64-linux-gnu"
    if file.name.startswith(("ld-linux", "libc.so", "libc-")):
        return
    where = f"{libraries}/slurm-wlm:{libraries}"
    options = ["--force-rpath", "--set-rpath", where]
    has_loader = subprocess.run(
        ["patchelf", "--print-interpreter", str(file)], capture_output=True, check=False
    )
    if has_loader.returncode == 0:
        options += ["--set-interpreter", str(libraries / "ld-linux-x86-64.so.2")]
    file.chmod(file.stat().st_mode | 0o200)
    subprocess.run(["patchelf", *options, str(file)], check=True, capture_output=True)


def _download(path: str) -> bytes:
    with urllib.request.urlopen(f"{MIRROR}/{path}", timeout=60) as answer:
        return bytes(answer.read())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
