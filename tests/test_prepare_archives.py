"""Protects: safe unpacking of archives, completely or not at all, and the resuming of downloads."""

import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import official
import pytest
from official import prepare

from vlmclassifier.preparing import archives, downloads
from vlmclassifier.preparing import official as layouts
from vlmclassifier.preparing.archives import unpack
from vlmclassifier.preparing.downloads import RemoteFile, checksum, fetch
from vlmclassifier.records import UserError


def test_an_absolute_path_in_a_tar_stays_inside(tmp_path):
    """tarfile's data filter strips the leading slash."""
    official.pack(tmp_path / "a.tgz", {f"{tmp_path}/outside/x.jpg": b"x"})
    unpack(tmp_path / "a.tgz", tmp_path / "in")
    assert not (tmp_path / "outside").exists() and list((tmp_path / "in").rglob("x.jpg"))


@pytest.mark.parametrize("name", ["../outside.jpg", "/outside.jpg", "a/../../outside.jpg", "link"])
def test_a_bad_zip_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        info = zipfile.ZipInfo(name)
        info.external_attr = (0o120777 if name == "link" else 0o100644) << 16
        opened.writestr(info, "target")
    with pytest.raises(UserError, match="a.zip is refused"):
        unpack(tmp_path / "a.zip", tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_an_archive_that_grows_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "EXTRA_BYTES", 1000)
    for file in (tmp_path / "a.tgz", tmp_path / "a.zip"):
        official.pack(file, {"a": b"0" * 1_000_000})
        if file.suffix == ".zip":
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
                opened.writestr("a", b"0" * 1_000_000)
        with pytest.raises(UserError, match="exceeds .* MiB when it is unpacked"):
            unpack(file, tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_empty_members_and_long_headers_are_limited(tmp_path, monkeypatch):
    """Many empty members can use up a disk's inodes, and a long extension of a header the memory."""
    official.pack(tmp_path / "many.tgz", {str(number): b"" for number in range(30)})
    monkeypatch.setattr(archives, "EXTRA_BYTES", 20 * archives.BLOCK_BYTES)
    with pytest.raises(UserError, match="exceeds .* MiB when it is unpacked"):
        unpack(tmp_path / "many.tgz", tmp_path / "in")
    monkeypatch.setattr(archives, "MAX_HEADER_BYTES", 500)
    with tarfile.open(tmp_path / "long.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 600}) as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(UserError, match="long.tar is refused .a header of "):
        unpack(tmp_path / "long.tar", tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_a_changed_byte_in_an_archive_is_detected(tmp_path):
    """Also after the last member, where gzip's checksum is, and without an official checksum."""
    file = official.pack(tmp_path / "a.tgz", {f"a/{number}.jpg": official.jpeg(number) * 50 for number in range(4)})
    content = file.read_bytes()
    for position in (*range(40, len(content), len(content) // 20), len(content) - 8):
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        with pytest.raises(UserError, match=r"a.tgz (cannot be unpacked|is refused|exceeds)") as raised:
            unpack(file, tmp_path / "in")
        assert "\n" not in str(raised.value) and not list((tmp_path / "in").iterdir())


def test_unsupported_zip_features_raise_an_error(tmp_path):
    official.pack(tmp_path / "a.zip", {"a.jpg": b"x"})
    content = (tmp_path / "a.zip").read_bytes()
    directory = content.index(b"PK\x01\x02")  # signature (4 bytes), two versions (2 each), flags (2), compression (2)
    for offset, value, reason in ((10, 9, "compression"), (8, 1, "encrypted")):  # 9: Deflate64, which Windows writes
        changed = bytearray(content)
        changed[directory + offset] = value
        changed[offset - 2] = value  # the member's own header has one version less
        (tmp_path / "a.zip").write_bytes(changed)
        with pytest.raises(UserError, match=f"a.zip cannot be unpacked .*{reason}.*unpack it yourself"):
            unpack(tmp_path / "a.zip", tmp_path / "in")
    official.pack(tmp_path / "a.tgz", {"x" * 300: b"x"})
    with pytest.raises(UserError, match="contains a file name that is too long"):
        unpack(tmp_path / "a.tgz", tmp_path / "in")


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    official.pack(tmp_path / "a.tgz", {"jpg/1.jpg": b"1"})
    with downloads.locked_folder(tmp_path), pytest.raises(UserError, match="Another process is writing to"):
        unpack(tmp_path / "a.tgz", tmp_path)
    unpack(tmp_path / "a.tgz", tmp_path)
    unpack(tmp_path / "a.tgz", tmp_path, expected="jpg")  # another process has unpacked it
    fetch("http://127.0.0.1:9/file", tmp_path / "a.tgz")  # another process has downloaded it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tgz", "jpg"]


def test_an_incomplete_folder_is_reported(tmp_path):
    official.pack(tmp_path / "a.tgz", {"jpg/1.jpg": b"1"})
    (tmp_path / "jpg").mkdir()
    with pytest.raises(UserError, match="jpg exists already but is incomplete"):
        unpack(tmp_path / "a.tgz", tmp_path)
    assert not list((tmp_path / "jpg").iterdir())


class FileHandler(BaseHTTPRequestHandler):
    """Sends `data` as /file."""

    data = b""
    max_bytes = 0  # after which each connection is closed; 0: no limit
    has_ranges = True  # whether range requests are supported
    starts = []  # the first byte of each request
    error_statuses = []  # sent for the next requests, last one first
    waits = []  # the seconds that the client slept

    def log_message(self, *args):
        """Print nothing."""

    def do_GET(self):
        if self.path != "/file":
            return self.send_error(404)
        if self.error_statuses:
            self.send_response(self.error_statuses.pop())
            self.send_header("Retry-After", "7")
            return self.end_headers()
        start = 0
        if self.has_ranges:
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.starts.append(start)
        if start >= len(self.data) and self.has_ranges:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.data)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.data) - start))
        self.end_headers()
        stop = start + self.max_bytes if self.max_bytes else len(self.data)
        self.wfile.write(self.data[start:stop])


@pytest.fixture
def server(monkeypatch):
    class Handler(FileHandler):  # a class of its own for each test: its attributes are the server's state
        starts, error_statuses, waits = [], [], []

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(downloads.time, "sleep", Handler.waits.append)
    Handler.url = f"http://127.0.0.1:{http.server_address[1]}/file"
    yield Handler
    http.shutdown()
    http.server_close()


def test_an_interrupted_download_is_resumed(tmp_path, server):
    server.data, server.max_bytes = bytes(range(256)) * 400, 30_000
    fetch(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.data and server.starts == [0, 30_000, 60_000, 90_000]
    assert not (tmp_path / "f.part").exists()
    (tmp_path / "g.part").write_bytes(server.data[:50_000])  # the leftover of a process that was killed
    server.max_bytes = 0
    fetch(server.url, tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == server.data and server.starts[4:] == [50_000]
    (tmp_path / "h.part").write_bytes(server.data)  # killed before the file was renamed
    fetch(server.url, tmp_path / "h")
    assert (tmp_path / "h").read_bytes() == server.data
    (tmp_path / "i.part").write_bytes(server.data + b"more")  # the file has changed on the server
    fetch(server.url, tmp_path / "i")
    assert (tmp_path / "i").read_bytes() == server.data


def test_a_busy_server_is_retried_after_the_time_it_states(tmp_path, server):
    server.data = b"0123456789"
    server.error_statuses[:] = [503, 429, 500]
    fetch(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.data and server.waits == [7, 7, 7]
    server.error_statuses[:] = [503] * 9
    with pytest.raises(UserError, match="no new bytes in 5 attempts .status 503"):
        fetch(server.url, tmp_path / "g")
    assert len(server.error_statuses) == 4


def test_a_server_without_ranges_sends_the_whole_file(tmp_path, server):
    server.data, server.has_ranges = b"0123456789" * 1000, False
    (tmp_path / "f.part").write_bytes(b"xxxx")
    fetch(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.data


def test_a_download_that_fails_raises_an_error(tmp_path, server):
    with pytest.raises(UserError, match="404.*data/README.md"):
        fetch(server.url + "s", tmp_path / "f")
    server.data, server.max_bytes, server.has_ranges = b"0" * 1000, 10, False
    with pytest.raises(UserError, match="no new bytes in 5 attempts .10 of 1000 bytes.*run the same command again"):
        fetch(server.url, tmp_path / "f")
    assert not (tmp_path / "f").exists()
    with pytest.raises(UserError, match="no new bytes in 5 attempts .ConnectionError"):
        fetch("http://127.0.0.1:9/file", tmp_path / "g")  # no server listens on this port


def test_downloaded_files_are_checked(tmp_path, server, monkeypatch):
    official.make_flowers(tmp_path)
    server.data = (tmp_path / "102flowers.tgz").read_bytes()
    correct = checksum(tmp_path / "102flowers.tgz")
    (tmp_path / "102flowers.tgz").unlink()
    others = [RemoteFile(file.name, None, checksum(tmp_path / file.name)) for file in layouts.FLOWERS[1:]]
    wrong = "0" * 32
    monkeypatch.setattr(layouts, "FLOWERS", (RemoteFile("102flowers.tgz", server.url, wrong), *others))
    options = {"download": True, "any_checksum": False}
    with pytest.raises(UserError, match=f"MD5 checksum {correct}, the official one is {wrong}"):
        prepare("flowers", tmp_path, **options)
    assert not (tmp_path / "jpg").exists()
    monkeypatch.setattr(layouts, "FLOWERS", (RemoteFile("102flowers.tgz", server.url, correct), *others))
    assert len(prepare("flowers", tmp_path, **options)) == 306 and server.starts == [0]
