"""Makes the stubs beside the protos: `python protos/generate.py [--check]`.

--check leaves the files alone and exits 1, naming those that differ, if they are not what the
protos and the installed grpcio-tools give.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
STUBS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(out: Path) -> None:
    """Writes the stubs of every proto to `out`, at the proto's own relative path."""
    protos = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"-I{well_known}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            *protos,
        ]
    )
    if code:
        raise SystemExit(code)


def read_stubs(root: Path) -> dict[str, bytes]:
    """Every stub below `root`: relative path → content."""
    paths = (path for pattern in STUBS for path in root.rglob(pattern))
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def stale() -> list[str]:
    """The stubs that are missing, left over or different from what the protos give."""
    with tempfile.TemporaryDirectory() as out:
        generate(Path(out))
        wanted = read_stubs(Path(out))
    found = read_stubs(ROOT)
    return sorted(p for p in wanted.keys() | found.keys() if wanted.get(p) != found.get(p))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    paths = stale()
    for path in paths:
        print(f"protos/{path} is not what its proto gives; run python protos/generate.py")
    return 1 if paths else 0


if __name__ == "__main__":
    sys.exit(main())
