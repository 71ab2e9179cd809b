"""Fetch anew the scripts that the book serves from its own folder, and hold them to the list.

    python tools/vendor.py             # fetch what the list names, in the versions it names
    python tools/vendor.py --check     # no network: the files beside the list are the listed ones

The list is `book/_static/vendor/vendor.json`: for each package its version, licence and source,
and for each file where the package keeps it and its SHA-256. npm packages come through `npm pack`,
which checks the registry's own sum, and again against the sum in the list; anywidget's script comes
from the installed Python package, for it has to speak to that one. To move to another version,
write it into the list and empty its `integrity`; the sums are then filled in.
"""

import base64
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "book" / "_static" / "vendor"
LIST = FOLDER / "vendor.json"


def sha256(data: bytes) -> str:
    """The sum by which the list knows a file."""
    return hashlib.sha256(data).hexdigest()


def read_list() -> list[dict]:
    """The packages, as the list names them."""
    return json.loads(LIST.read_text(encoding="utf-8"))["packages"]


def faults(folder: Path, packages: list[dict]) -> list[str]:
    """What differs between a folder and the list: missing, changed and unlisted files."""
    listed = {name: file["sha256"] for p in packages for name, file in p["files"].items()}
    there = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    wrong = [f"{name} is missing" for name in sorted(listed.keys() - there.keys())]
    wrong += [
        f"{name} is not in the list"
        for name in sorted(there.keys() - listed.keys() - {"README.md", LIST.name})
    ]
    for name in sorted(listed.keys() & there.keys()):
        if sha256(there[name].read_bytes()) != listed[name]:
            wrong.append(f"{name} is not the file that the list names")
    return wrong


def without_modules(text: str, names: list[str]) -> str:
    """An AMD bundle, as concatenated `define("name", ...)` calls, without the modules named."""
    starts = [found.start() for found in re.finditer(r'(?:^|(?<=\n))define\("', text)]
    starts = [0, *starts] if starts[:1] != [0] else starts
    pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    for name in names:
        (piece,) = (p for p in pieces if p.startswith(f'define("{name}",'))
        pieces.remove(piece)
    return "".join(pieces)


def npm_files(package: dict) -> dict[str, bytes]:
    """Every file of an npm package; its sum has to be the list's, or fills the list's empty one."""
    wanted = f"{package['name']}@{package['version']}"
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, wanted]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=folder)
        (path,) = Path(folder).glob("*.tgz")
        data = path.read_bytes()
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
        if package.setdefault("integrity", "") == "":
            package["integrity"] = integrity
        if package["integrity"] != integrity:
            raise SystemExit(
                f"{wanted}: the registry's archive is not the one that {LIST.name} names; "
                "find out why before you trust it"
            )
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.isfile()]
            return {m.name.removeprefix("package/"): archive.extractfile(m).read() for m in members}


def pypi_files(package: dict) -> dict[str, bytes]:
    """Every file of an installed Python package, in the version that the list names."""
    there = importlib.metadata.distribution(package["name"])
    if there.version != package["version"]:
        raise SystemExit(
            f"{package['name']} {there.version} is installed and {LIST.name} names "
            f"{package['version']}: install that one, or change the list"
        )
    return {
        re.sub(r"^[^/]+\.dist-info/", "", file.as_posix()): Path(file.locate()).read_bytes()
        for file in there.files
        if "__pycache__" not in file.parts and Path(file.locate()).is_file()
    }


def refresh(package: dict) -> None:
    """Write a package's files and their sums; a file without `path` is kept by hand."""
    fetched = {"npm": npm_files, "pypi": pypi_files}[package["from"]](package)
    for name, file in package["files"].items():
        target = FOLDER / name
        if "path" in file:
            data = fetched[file["path"]]
            if "without" in file:
                text = data.decode("utf-8")
                data = without_modules(text, file["without"]["modules"]).encode("utf-8")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        file["sha256"] = sha256(target.read_bytes())


def main() -> int:
    """Refresh the folder, or with --check only compare it with the list."""
    packages = read_list()
    if "--check" not in sys.argv[1:]:
        for package in packages:
            refresh(package)
            print(f"{package['name']} {package['version']}", flush=True)
        text = json.dumps({"packages": packages}, indent=2, ensure_ascii=False)
        LIST.write_text(text + "\n", encoding="utf-8", newline="\n")
    wrong = faults(FOLDER, packages)
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
