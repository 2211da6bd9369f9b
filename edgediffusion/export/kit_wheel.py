"""The installed package as a wheel, made without a source tree, a build tool or a network: it is Python alone.

Format: packaging.python.org/en/latest/specifications/binary-distribution-format. The shipped pipelines are left out, which would be most of
it. The same package gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import edgediffusion
from edgediffusion import __version__
from edgediffusion.errors import SourceError

NAME = "edgediffusion"
_LEFT_OUT = ("__pycache__", "reference")
_FIRST_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file knows
_WHEEL = "Wheel-Version: 1.0\nGenerator: {name} ({version})\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder: Path) -> str:
    """Write the wheel into ``folder``; returns its file name.

    Raises:
        SourceError: the package runs from a folder and was never installed, so nothing says what it depends on.
    """
    root = Path(edgediffusion.__file__).parent
    info = f"{NAME}-{__version__}.dist-info"
    files = {f"{NAME}/{p.relative_to(root).as_posix()}": p.read_bytes() for p in sorted(root.rglob("*")) if _belongs(p, root)}
    files |= {f"{info}/{name}": text.encode() for name, text in _metadata().items()}
    record = "".join(f"{name},{_digest(content)},{len(content)}\n" for name, content in sorted(files.items())) + f"{info}/RECORD,,\n"
    wheel = f"{NAME}-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(folder / wheel, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in (*sorted(files.items()), (f"{info}/RECORD", record.encode())):
            entry = zipfile.ZipInfo(name, _FIRST_TIME)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            out.writestr(entry, content)
    return wheel


def _belongs(path: Path, root: Path) -> bool:
    return path.is_file() and not set(path.relative_to(root).parts) & set(_LEFT_OUT) and path.suffix not in (".pyc", ".pyo")


def _metadata() -> dict[str, str]:
    """What the installed package says of itself; its version is the code's, which an editable installation may have outgrown."""
    try:
        known = distribution(NAME)
    except PackageNotFoundError:
        raise SourceError(f"The package '{NAME}' is not installed, so no wheel can be made of it", do="Install it: pip install .") from None
    metadata = known.read_text("METADATA") or known.read_text("PKG-INFO") or ""
    texts = {
        "METADATA": re.sub(r"^Version: .*$", f"Version: {__version__}", metadata, count=1, flags=re.MULTILINE),
        "WHEEL": _WHEEL.format(name=NAME, version=__version__),
        "entry_points.txt": known.read_text("entry_points.txt") or "",
        "licenses/LICENSE": known.read_text("licenses/LICENSE") or "",
    }
    return {name: text for name, text in texts.items() if text}


def _digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
