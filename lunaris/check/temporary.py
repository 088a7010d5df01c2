"""Where a run's processes write temporary files and compiled kernels: is it fit for that. No torch.

A compiled kernel is a file that the process loads: on a network file system many processes wait for
each other, and from a file system without execution nothing is loaded.
"""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from pathlib import Path

from lunaris.check.item import FAIL, OK, Item
from lunaris.config.schema.root import Config

_MOUNTS = Path("/proc/mounts")
_NOEXEC = "mounted without execution (noexec)"
_NETWORK = re.compile(
    r"nfs\d?|lustre|gpfs|beegfs|cifs|smb3?|ceph|afs|9p|glusterfs|panfs|wekafs|orangefs"
    r"|fuse\.(sshfs|glusterfs|ceph.*|s3fs|gcsfuse|juicefs)"
)


def temporary_item(cfg: Config) -> Item:
    """Return whether temporary files and the compilers' caches lie where they can be used."""
    wrong, slow, said, figures = [], [], [], {}
    # Files are written there nevertheless.
    noexec: tuple[str, ...] = ()
    places = _places()
    for variable, folder in places.items():
        kind = _file_system(folder)
        network = kind is not None and _NETWORK.fullmatch(kind) is not None
        figures[variable] = {"folder": str(folder), "file_system": kind, "network": network}
        said.append(f"{folder} ({kind})" if kind else str(folder))
        fault = _fault(folder)
        if fault == _NOEXEC and variable == "TMPDIR":
            fault, noexec = None, (f"{_other('TMPDIR')}executed from: {folder} is {_NOEXEC}",)
        if fault:
            wrong.append(f"{variable}={folder}: {fault}")
        elif network:
            slow.append(variable)
    advice = tuple(
        f"export {name}=/FOLDER, on a disk of this machine: processes of all nodes wait for each "
        f"other on {figures[name]['file_system']}"
        for name in slow
    )
    advice += noexec + _ignored(places["TMPDIR"])
    if not wrong:
        return Item("temporary", OK, ", ".join(dict.fromkeys(said)), figures, advice)
    mend = tuple(f"{_other(text.partition('=')[0])}written and executed from" for text in wrong)
    # Without compilation only FlexAttention on GPUs needs the caches; temporary files all runs do.
    needed = cfg.trainer.compile_model or any(text.startswith("TMPDIR") for text in wrong)
    return Item("temporary", FAIL if needed else OK, "; ".join(wrong), figures, mend + advice)


def _other(variable: str) -> str:
    return f"export {variable}=/FOLDER, one that can be "


def _ignored(taken: Path) -> tuple[str, ...]:
    """Return advice where Python found TMPDIR unfit, and took another folder without an error."""
    given = os.environ.get("TMPDIR")
    if not given or os.path.abspath(given) == str(taken.absolute()):
        return ()
    return (f"{_other('TMPDIR')}written: {given} cannot, and {taken} is taken instead",)


def _places() -> dict[str, Path]:
    """Return the folders by the variable that names each: those of torch's and Triton's defaults.

    Raises nothing where there is no folder to write to: the first candidate is returned.
    """
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:
        temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # No entry for this uid, as in containers; torch names it so, too.
        name = f"uid_{os.getuid()}"
    user = re.sub(r'[\\/:*?"<>|]', "_", name)
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR", temporary / f"torchinductor_{user}")
    triton = os.environ.get("TRITON_CACHE_DIR", os.path.expanduser("~/.triton/cache"))
    return {
        "TMPDIR": temporary,
        "TORCHINDUCTOR_CACHE_DIR": Path(inductor),
        "TRITON_CACHE_DIR": Path(triton),
    }


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    # Path.exists raises where a folder above may not be searched (Python 3.11).
    while not os.path.exists(folder):
        folder = folder.parent
    return folder


def _fault(folder: Path) -> str | None:
    """Return why a folder, which need not exist yet, cannot hold compiled kernels."""
    found = _existing(folder)
    if not found.is_dir():
        return f"{found} is no folder"
    if not os.access(found, os.W_OK | os.X_OK):
        return "cannot be written" if found == folder else f"{found} cannot be written"
    if os.statvfs(found).f_flag & getattr(os, "ST_NOEXEC", 0):
        return _NOEXEC
    return None


def _file_system(folder: Path) -> str | None:
    """Return the type of the file system that holds a folder, None where that is not known."""
    try:
        lines = _MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return None
    found = _existing(folder).resolve()
    best: tuple[int, str] | None = None
    for words in map(str.split, lines):
        if len(words) < 3:
            continue
        mounted = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), words[1]))
        # The later of two mounts at one place hides the earlier.
        if found.is_relative_to(mounted) and (best is None or len(mounted.parts) >= best[0]):
            best = (len(mounted.parts), words[2])
    return best[1] if best else None
