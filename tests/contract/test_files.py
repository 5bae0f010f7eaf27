"""What the program relies on in files and downloads, asked of the fakes and of the real thing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nodeagent.adapters.files import LocalFiles
from nodeagent.adapters.web import WebFetcher
from nodeagent.errors import HostError
from nodeagent.host import Files, Web
from tests.contract.surroundings import needs_root, own_network
from tests.lab.host import run
from tests.unit.fakes import FakeFiles, FakeWeb

LOCAL = LocalFiles()
CONTENT = "content → Inhalt\r\nand more\n" * 1000
SHA256 = hashlib.sha256(CONTENT.encode()).hexdigest()


def ignore() -> None:
    """For `alive`, where a test does not ask about it."""


@dataclass
class Rig:
    files: Files
    top: Path


@pytest.fixture(params=["fake", "real"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    if request.param == "fake":
        return Rig(FakeFiles(), Path("/top"))
    return Rig(LOCAL, tmp_path)


# -- files


def test_what_is_not_there_is_no_error(rig: Rig) -> None:
    path = rig.top / "none"
    assert rig.files.read(path) is None
    assert not rig.files.exists(path)
    rig.files.remove(path)


@pytest.mark.parametrize("text", ["", "a\n", "a\r\nb\rc\n", "Zürich → 東京", "no UTF-8: \udcff"])
def test_text_comes_back_as_it_was(rig: Rig, text: str) -> None:
    path = rig.top / "deep/er/file"
    rig.files.write(path, text, 0o600)
    assert rig.files.read(path) == text
    assert rig.files.exists(path)
    rig.files.write(path, "next", 0o600)
    assert rig.files.read(path) == "next"
    rig.files.write(path, "private", 0o600)
    rig.files.remove(path)
    assert rig.files.read(path) is None
    rig.files.write(path, "anew", None)
    assert mode(rig, path) == 0o644, "its own, not the old one's"


def mode(rig: Rig, path: Path) -> int:
    if isinstance(rig.files, FakeFiles):
        return rig.files.modes[path]
    return path.stat().st_mode & 0o7777


def test_modes(rig: Rig) -> None:
    path = rig.top / "file"
    rig.files.write(path, "1", None)
    assert mode(rig, path) == 0o644
    rig.files.write(path, "2", 0o600)
    assert mode(rig, path) == 0o600
    rig.files.write(path, "3", None)
    assert mode(rig, path) == 0o600, "kept"


@pytest.mark.parametrize(
    ("permissions", "is_private"),
    [(0o600, True), (0o400, True), (0o700, True), (0o640, False), (0o620, False), (0o604, False),
     (0o602, False), (0o644, False)],
    ids=["600-is", "400-is", "700-is", "640-is-not", "620-is-not", "604-is-not", "602-is-not",
         "644-is-not"],
)  # fmt: skip
def test_what_others_can_read_or_write_is_not_private(
    rig: Rig, permissions: int, is_private: bool
) -> None:
    path = rig.top / "file"
    rig.files.write(path, "key", permissions)
    assert rig.files.is_private(path) == is_private
    rig.files.link(rig.top / "link", path)
    assert rig.files.is_private(rig.top / "link") == is_private, "the link's target counts"


def test_what_is_no_file_is_not_private(rig: Rig) -> None:
    assert not rig.files.is_private(rig.top / "none")
    rig.files.write(rig.top / "file", "key", 0o600)
    assert not rig.files.is_private(rig.top / "file/none")
    assert not rig.files.exists(rig.top / "file/none")
    rig.files.make_private_directory(rig.top / "directory")
    assert not rig.files.is_private(rig.top / "directory")


def test_a_directory_can_be_there_before_anything_in_it(rig: Rig) -> None:
    path = rig.top / "deep/er"
    for _ in range(2):
        rig.files.make_private_directory(path)
        assert rig.files.exists(path)
    rig.files.write(path / "file", "1", None)
    rig.files.make_private_directory(path)
    assert rig.files.read(path / "file") == "1"
    with pytest.raises(HostError, match=f"{path}/file: File exists"):
        rig.files.make_private_directory(path / "file")


@pytest.mark.parametrize("before", ["nothing", "a-file", "another-link", "a-dead-link"])
def test_a_link_takes_the_place_of_what_was_there(rig: Rig, before: str) -> None:
    path, target, other = rig.top / "bin/it", rig.top / "target", rig.top / "other"
    rig.files.write(target, "target", None)
    rig.files.write(other, "other", None)
    if before == "a-file":
        rig.files.write(path, "file", None)
    elif before == "another-link":
        rig.files.link(path, other)
    elif before == "a-dead-link":
        rig.files.link(path, rig.top / "nowhere")
        assert not rig.files.exists(path)
        assert rig.files.read(path) is None
    rig.files.link(path, target)
    assert rig.files.exists(path)
    assert rig.files.read(path) == "target"
    rig.files.write(path, "through the link", None)
    assert rig.files.read(target) == "through the link"
    assert rig.files.read(other) == "other"
    rig.files.remove(path)
    assert not rig.files.exists(path)
    assert rig.files.exists(target), "only the link is gone"


def test_a_link_takes_no_directorys_place(rig: Rig) -> None:
    rig.files.write(rig.top / "bin/inside", "1", None)
    with pytest.raises(HostError, match=f"link {rig.top / 'bin'}: Is a directory"):
        rig.files.link(rig.top / "bin", rig.top / "target")
    assert rig.files.read(rig.top / "bin/inside") == "1"


def test_a_tree_is_copied(rig: Rig) -> None:
    source, target = rig.top / "from", rig.top / "lib/1.0/to"
    rig.files.write(source / "a", "1", 0o600)
    rig.files.write(source / "deep/b", "2", 0o755)
    rig.files.copy_tree(source, target)
    assert rig.files.read(target / "a") == "1"
    assert rig.files.read(target / "deep/b") == "2"
    assert (mode(rig, target / "a"), mode(rig, target / "deep/b")) == (0o600, 0o755)
    rig.files.write(source / "a", "newer", None)
    with pytest.raises(HostError, match=f"copy {source}: Directory not empty"):
        rig.files.copy_tree(source, target)
    assert rig.files.read(target / "a") == "1"
    with pytest.raises(HostError, match="No such file or directory"):
        rig.files.copy_tree(rig.top / "none", rig.top / "lib/2.0/to")
    assert not rig.files.exists(rig.top / "lib/2.0/to")


def test_what_is_compiled_stays_as_it_is(rig: Rig) -> None:
    texts = {"good.py": "X = 1\n", "wrong.py": "X = = 1\n", "data.txt": "X = = 1\n"}
    for name, text in texts.items():
        rig.files.write(rig.top / "from" / name, text, None)
    rig.files.compile(rig.top / "from")
    rig.files.compile(rig.top / "none")
    assert {name: rig.files.read(rig.top / "from" / name) for name in texts} == texts


def test_a_directory_in_its_place_is_an_error(rig: Rig) -> None:
    path = rig.top / "file"
    rig.files.write(path / "inside", "1", None)
    with pytest.raises(HostError, match=str(path)):
        rig.files.read(path)
    with pytest.raises(HostError, match=str(path)):
        rig.files.write(path, "2", None)
    with pytest.raises(HostError, match=str(path)):
        rig.files.remove(path)
    assert rig.files.read(path / "inside") == "1"


def test_a_program_is_put_in_place(rig: Rig) -> None:
    rig.files.write(rig.top / "archive", "#!/bin/sh\n", 0o600)
    rig.files.unpack_program(rig.top / "archive", rig.top / "bin/program")
    assert rig.files.read(rig.top / "bin/program") == "#!/bin/sh\n"
    assert mode(rig, rig.top / "bin/program") == 0o755
    with pytest.raises(HostError, match="none"):
        rig.files.unpack_program(rig.top / "none", rig.top / "bin/other")
    assert not rig.files.exists(rig.top / "bin/other")


def test_a_lock_has_one_holder(rig: Rig) -> None:
    path = rig.top / "lock"
    assert not rig.files.is_held(path)
    with rig.files.try_lock(path) as first:
        assert first
        assert rig.files.is_held(path)
        with rig.files.try_lock(path) as second:
            assert not second
        assert rig.files.is_held(path), "the loser's end is not the holder's"
    assert not rig.files.is_held(path)
    with rig.files.try_lock(path) as again:
        assert again


# -- what only the real file system can show


def test_owner_and_mode_are_kept_where_no_mode_is_given(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("1")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    before = path.stat()
    LOCAL.write(path, "2", None)
    after = path.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (
        before.st_uid,
        before.st_gid,
        before.st_mode,
    )
    assert after.st_ino != before.st_ino, "replaced, not written over"


@pytest.mark.parametrize("target", ["there", "dangling"])
def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path, target: str) -> None:
    real = tmp_path / "elsewhere/file"
    real.parent.mkdir()
    if target == "there":
        real.write_text("old")
        real.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to("elsewhere/file")
    LOCAL.write(link, "new", None)
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == (0o600 if target == "there" else 0o644)
    assert list(real.parent.iterdir()) == [real]


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("link")
    with pytest.raises(HostError, match="link"):
        LOCAL.write(link, "new", None)
    with pytest.raises(HostError, match="link"):
        LOCAL.read(link)


def test_a_leftover_of_a_killed_write_is_no_hindrance(tmp_path: Path) -> None:
    leftover = tmp_path / ".file.nodeagent-new"
    leftover.write_text("half")
    leftover.chmod(0o666)
    LOCAL.write(tmp_path / "file", "whole", 0o600)
    assert (tmp_path / "file").read_text() == "whole"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_fifo_in_its_place_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(HostError, match="no plain file"):
        LOCAL.write(tmp_path / "file", "new", None)
    assert (tmp_path / "file").is_fifo()


@needs_root
def test_what_belongs_to_another_user_is_not_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    LOCAL.write(path, "key", 0o600)
    os.chown(path, 12, 34)
    assert not LOCAL.is_private(path)
    os.chown(path, 0, 34)
    assert LOCAL.is_private(path)


def test_a_private_directory_is_for_its_owner_alone(tmp_path: Path) -> None:
    LOCAL.make_private_directory(tmp_path / "deep/er")
    assert (tmp_path / "deep/er").stat().st_mode & 0o777 == 0o700
    (tmp_path / "deep/er").chmod(0o755)
    LOCAL.make_private_directory(tmp_path / "deep/er")
    assert (tmp_path / "deep/er").stat().st_mode & 0o777 == 0o755, "its owner's business"


def test_a_link_is_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/.it.nodeagent-new").symlink_to("/left/by/a/killed/run")
    LOCAL.link(tmp_path / "bin/it", tmp_path / "target")
    assert (tmp_path / "bin/it").readlink() == tmp_path / "target"
    assert list((tmp_path / "bin").iterdir()) == [tmp_path / "bin/it"]
    (tmp_path / "bin/directory").mkdir()
    with pytest.raises(HostError):
        LOCAL.link(tmp_path / "bin/directory", tmp_path / "target")
    assert {path.name for path in (tmp_path / "bin").iterdir()} == {"it", "directory"}


def test_half_a_copy_is_never_in_place(tmp_path: Path) -> None:
    source, target = tmp_path / "from", tmp_path / "lib/1.0/to"
    left = target.with_name(".to.nodeagent-new")
    left.mkdir(parents=True)
    (left / "half").touch()
    source.mkdir()
    (source / "a").write_text("1")
    (source / "dead").symlink_to("nowhere")
    with pytest.raises(HostError, match=f"copy {source}: .*dead"):
        LOCAL.copy_tree(source, target)
    assert list((tmp_path / "lib/1.0").iterdir()) == []
    (source / "dead").unlink()
    LOCAL.copy_tree(source, target)
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list((tmp_path / "lib/1.0").iterdir()) == [target]


def test_compiled_modules_need_no_compiling_where_they_are_copied_to(tmp_path: Path) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    source.mkdir()
    (source / "module.py").write_text("print(__cached__)\n")
    LOCAL.compile(source)
    LOCAL.copy_tree(source, target)
    (compiled,) = (target / "__pycache__").iterdir()
    before = compiled.stat()
    said = subprocess.run(
        [sys.executable, "-c", "import module"], cwd=target, capture_output=True, text=True
    )
    assert said.stdout == f"{compiled}\n"
    assert compiled.stat().st_mtime_ns == before.st_mtime_ns, "written again"
    assert compiled.stat().st_ino == before.st_ino, "written again"


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path)
    try:
        yield path
    finally:
        run("umount", "--lazy", path)


@pytest.mark.lab
@needs_root
def test_on_a_full_disk_the_old_file_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        LOCAL.write(disk / "file", "old", 0o600)
        with pytest.raises(HostError, match="No space left"):
            LOCAL.write(disk / "file", "x" * 200_000, 0o600)
        assert (disk / "file").read_text() == "old"
        (tmp_path / "big").write_text("x" * 200_000)
        with pytest.raises(HostError, match="No space left"):
            LOCAL.unpack_program(tmp_path / "big", disk / "program")
        digest = hashlib.sha256(b"x" * 200_000).hexdigest()
        with pytest.raises(HostError, match="No space left"):
            WebFetcher().fetch(str(tmp_path / "big"), disk / "fetched", digest, ignore)
        (tmp_path / "tree").mkdir()
        (tmp_path / "big").rename(tmp_path / "tree/big")
        with pytest.raises(HostError, match="No space left"):
            LOCAL.copy_tree(tmp_path / "tree", disk / "copied")
        assert list(disk.iterdir()) == [disk / "file"]
        LOCAL.write(disk / "file", "new", 0o600)


@pytest.mark.lab
@needs_root
def test_on_a_read_only_disk_the_old_file_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        LOCAL.write(disk / "file", "old", 0o600)
        run("mount", "-o", "remount,ro", disk)
        for path in (disk / "file", disk / "deep/file"):
            with pytest.raises(HostError, match="Read-only file system"):
                LOCAL.write(path, "new", 0o600)
        with pytest.raises(HostError, match="Read-only file system"):
            LOCAL.remove(disk / "file")
        assert list(disk.iterdir()) == [disk / "file"]
        assert LOCAL.read(disk / "file") == "old"


def test_a_zip_gives_the_program_of_that_name(tmp_path: Path) -> None:
    archive = tmp_path / "consul.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("LICENSE", "…")
        packed.writestr("consul", "program")
    LOCAL.unpack_program(archive, tmp_path / "bin/consul")
    assert (tmp_path / "bin/consul").read_text() == "program"
    with pytest.raises(HostError, match=r"consul\.zip"):
        LOCAL.unpack_program(archive, tmp_path / "bin/other")
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(b"program", b"PROGRAM", 1))  # its checksum is wrong now
    with pytest.raises(HostError, match=r"consul\.zip"):
        LOCAL.unpack_program(archive, tmp_path / "bin/consul")
    assert (tmp_path / "bin/consul").read_text() == "program"
    assert list((tmp_path / "bin").iterdir()) == [tmp_path / "bin/consul"]


HOLDER = """
import sys
from pathlib import Path
from nodeagent.adapters.files import LocalFiles
with LocalFiles().try_lock(Path(sys.argv[1])) as is_ours:
    print(is_ours, flush=True)
    sys.stdin.read()
"""


def test_a_lock_of_another_process_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert LOCAL.is_held(path)
        with LOCAL.try_lock(path) as is_ours:
            assert not is_ours
        holder.kill()
        holder.wait()
    assert not LOCAL.is_held(path)
    with LOCAL.try_lock(path) as is_ours:
        assert is_ours


# -- downloads


class _Server(BaseHTTPRequestHandler):
    """Serves CONTENT at /file, and what goes wrong elsewhere."""

    def do_GET(self) -> None:
        body = CONTENT.encode()
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            body = b""
        elif self.path in ("/file", "/truncated", "/large"):
            self.send_response(200)
            body *= 20 if self.path == "/large" else 1
        else:
            self.send_response(404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:100] if self.path == "/truncated" else body)

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class WebRig:
    web: Web
    files: Files
    top: Path
    url: str


@pytest.fixture
def http() -> Iterator[str]:
    with own_network(), ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=["fake", pytest.param("real", marks=[pytest.mark.lab, needs_root])])
def web_rig(request: pytest.FixtureRequest, tmp_path: Path) -> WebRig:
    if request.param == "fake":
        files = FakeFiles()
        web = FakeWeb(files, {"http://fake/file": CONTENT})
        return WebRig(web, files, Path("/top"), "http://fake")
    return WebRig(WebFetcher(), LOCAL, tmp_path, request.getfixturevalue("http"))


def test_what_has_the_right_digest_is_kept(web_rig: WebRig) -> None:
    path = web_rig.top / "images/it"
    web_rig.web.fetch(f"{web_rig.url}/file", path, SHA256, ignore)
    assert web_rig.files.read(path) == CONTENT
    web_rig.web.fetch(f"{web_rig.url}/file", path, SHA256, ignore)


def test_a_download_tells_that_it_goes_on(web_rig: WebRig) -> None:
    told: list[None] = []
    web_rig.web.fetch(f"{web_rig.url}/file", web_rig.top / "it", SHA256, lambda: told.append(None))
    assert told


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize(("name", "digest"), [("file", "0" * 64), ("none", SHA256)])
def test_what_is_wrong_leaves_things_as_they_were(
    web_rig: WebRig, name: str, digest: str, before: str | None
) -> None:
    path = web_rig.top / "it"
    if before is not None:
        web_rig.files.write(path, before, 0o600)
    with pytest.raises(HostError, match=name):
        web_rig.web.fetch(f"{web_rig.url}/{name}", path, digest, ignore)
    assert web_rig.files.read(path) == before


@pytest.mark.lab
@needs_root
def test_a_download_that_breaks_off_leaves_nothing(http: str, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    half = hashlib.sha256(CONTENT.encode()[:100]).hexdigest()
    for digest in (SHA256, half):  # even if what came is what was asked for, by chance
        with pytest.raises(HostError, match="truncated"):
            WebFetcher().fetch(f"{http}/truncated", tmp_path / "to/it", digest, ignore)
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.lab
@needs_root
def test_a_slow_download_tells_it_long_before_its_end(http: str, tmp_path: Path) -> None:
    told: list[None] = []
    digest = hashlib.sha256(CONTENT.encode() * 20).hexdigest()
    WebFetcher().fetch(f"{http}/large", tmp_path / "it", digest, lambda: told.append(None))
    assert len(told) >= (tmp_path / "it").stat().st_size // 100_000


@pytest.mark.lab
@needs_root
def test_redirects_are_followed(http: str, tmp_path: Path) -> None:
    WebFetcher().fetch(f"{http}/moved", tmp_path / "it", SHA256, ignore)


@pytest.mark.lab
@needs_root
@pytest.mark.usefixtures("http")
def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
        with pytest.raises(HostError, match="refused"):
            WebFetcher().fetch(url, tmp_path / "it", SHA256, ignore)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", ["ftp://host/file", "http://", "http://[::1", "/none"])
def test_a_location_that_makes_no_sense_is_an_error(tmp_path: Path, location: str) -> None:
    with pytest.raises(HostError):
        WebFetcher().fetch(location, tmp_path / "it", SHA256, ignore)
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_copied(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(CONTENT.encode())
    WebFetcher().fetch(str(tmp_path / "from"), tmp_path / "it", SHA256, ignore)
    assert (tmp_path / "it").read_bytes() == CONTENT.encode()
