"""dist/ holds a release: the wheel, and one self-contained file for this architecture.

The file runs on every CPython of PYTHONS: it carries the dependencies' wheels for all of them in
one directory (compiled modules carry the interpreter's version in their names). Packages come from
wherever this machine's pip is configured to get them.
"""

# ruff: noqa: TID251

from __future__ import annotations

import configparser
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST, BUILD = ROOT / "dist", ROOT / "build"
# The lowest first: its stable-ABI modules suit all.
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
MACHINE = platform.machine()
# The oldest C library with a Python 3.10 of its own is Ubuntu 22.04's 2.35.
PLATFORMS = [f"manylinux_2_{minor}_{MACHINE}" for minor in range(34, 4, -1)]
PLATFORMS += [f"manylinux{legacy}_{MACHINE}" for legacy in ("2014", "2010", "1")]
# What no command of nodeagent ever imports.
UNUSED = re.compile(
    r"(^|/)(tests?|__pycache__|bin)/|\.(pyi|pyx|pxd|c|h)$|/RECORD$"
    r"|^_?cffi/(?!.*\.(py|so)$)|/sboms/"
)
EPOCH = "1700000000"  # a date every zip can hold, and the same in every build


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    if done.returncode:
        sys.exit(f"pip {' '.join(arguments[:2])} failed:\n{done.stderr.strip()}")
    return done.stdout


def for_python(version: str) -> list[str]:
    """Pip's options for packages of another Python than the one running."""
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={version}"]
    return options + [f"--platform={name}" for name in PLATFORMS]


def dependencies() -> Path:
    """Return a directory with all dependencies, made again only when what it is made of changes."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"].split("\n")
    wanted = sorted(line.strip() for line in wanted if line.strip())
    recipe = json.dumps([wanted, PYTHONS, PLATFORMS, UNUSED.pattern])
    site = BUILD / "release" / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    if site.exists():
        return site
    shutil.rmtree(site.parent, ignore_errors=True)
    site.parent.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as scratch:
        dry = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report=-"]
        # pip wants a target together with a foreign platform, also when nothing is installed.
        dry += [f"--target={scratch}/none", *for_python(PYTHONS[0]), *wanted]
        chosen = [item["metadata"] for item in json.loads(pip(*dry))["install"]]
        constraints = Path(scratch, "constraints.txt")
        constraints.write_text("".join(f"{x['name']}=={x['version']}\n" for x in chosen))
        whole = Path(scratch, "site")
        for version in PYTHONS:
            wheels = Path(scratch, version)
            pip(
                *["download", "--quiet", f"--dest={wheels}", f"--constraint={constraints}"],
                *[*for_python(version), *wanted],
            )
            for wheel in sorted(wheels.glob("*.whl")):
                unpack(wheel, whole)
        whole.rename(site)
    return site


def unpack(wheel: Path, site: Path) -> None:
    """Add what a wheel holds; of two files of one name the first stays."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not UNUSED.search(name) and not name.endswith("/") and not (site / name).exists():
                archive.extract(name, site)


def build_wheel(directory: Path) -> Path:
    # setuptools would pack modules that are gone by now
    shutil.rmtree(BUILD / "lib", ignore_errors=True)
    pip("wheel", "--quiet", "--no-deps", f"--wheel-dir={directory}", str(ROOT))
    (wheel,) = directory.glob("*.whl")
    return wheel


def main() -> None:
    os.environ["SOURCE_DATE_EPOCH"] = EPOCH
    started = time.monotonic()
    site = dependencies()
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        made = Path(scratch, "made")
        wheel = build_wheel(made)
        pyz = made / f"nodeagent-{wheel.name.split('-')[1]}-{MACHINE}.pyz"
        whole = Path(scratch, "site-packages")
        shutil.copytree(site, whole)
        unpack(wheel, whole)
        shiv = [sys.executable, "-m", "shiv", "--site-packages", str(whole), "--output-file"]
        shiv += [str(pyz), "--console-script", "nodeagent", "--python", "/usr/bin/env python3"]
        subprocess.run([*shiv, "--compressed", "--reproducible"], check=True, timeout=300)
        digest = hashlib.sha256(pyz.read_bytes()).hexdigest()
        pyz.with_name(f"{pyz.name}.sha256").write_text(f"{digest}  {pyz.name}\n")
        names = sorted(path.name for path in made.iterdir())
        DIST.mkdir(exist_ok=True)
        for name in names:  # each in one move: who reads dist/ meanwhile sees whole files
            (made / name).replace(DIST / name)
    for path in DIST.iterdir():
        if path.name not in names:
            path.unlink()
        elif path.suffix != ".sha256":
            print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.1f} MB")
    print(f"sha256 {digest}")
    print(f"made in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
