"""Protects: archives unpacked safely, all or nothing, and downloads that go on where they broke off."""

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
from vlmclassifier.preparing.downloads import Remote, checksum, fetch
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


def test_an_archive_that_grows_beyond_reason_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "SPARE", 1000)
    for file in (tmp_path / "a.tgz", tmp_path / "a.zip"):
        official.pack(file, {"a": b"0" * 1_000_000})
        if file.suffix == ".zip":
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
                opened.writestr("a", b"0" * 1_000_000)
        with pytest.raises(UserError, match="grows beyond"):
            unpack(file, tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_what_an_archive_says_of_itself_is_counted_too(tmp_path, monkeypatch):
    """Empty members fill a disk's list of files, and a header's extension the memory."""
    official.pack(tmp_path / "many.tgz", {str(number): b"" for number in range(30)})
    monkeypatch.setattr(archives, "SPARE", 20 * archives.BLOCK)
    with pytest.raises(UserError, match="grows beyond"):
        unpack(tmp_path / "many.tgz", tmp_path / "in")
    monkeypatch.setattr(archives, "LONGEST_HEADER", 500)
    with tarfile.open(tmp_path / "long.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 600}) as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(UserError, match="long.tar is refused .a header of "):
        unpack(tmp_path / "long.tar", tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_a_byte_changed_in_a_packed_archive_is_noticed(tmp_path):
    """Also behind the last member, where gzip's checksum is, and where no official checksum is known."""
    file = official.pack(tmp_path / "a.tgz", {f"a/{number}.jpg": official.jpeg(number) * 50 for number in range(4)})
    whole = file.read_bytes()
    for place in (*range(40, len(whole), len(whole) // 20), len(whole) - 8):
        file.write_bytes(bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]]))
        with pytest.raises(UserError, match=r"a.tgz (cannot be unpacked|is refused|grows)") as raised:
            unpack(file, tmp_path / "in")
        assert "\n" not in str(raised.value) and not list((tmp_path / "in").iterdir())


def test_what_our_zip_reader_cannot_do_is_a_sentence(tmp_path):
    official.pack(tmp_path / "a.zip", {"a.jpg": b"x"})
    plain = (tmp_path / "a.zip").read_bytes()
    middle = plain.index(b"PK\x01\x02")  # the list of members: 4 bytes, then 2 of versions each, flags, compression
    for where, value, words in ((10, 9, "compression"), (8, 1, "encrypted")):  # 9: Deflate64, as Windows writes it
        changed = bytearray(plain)
        changed[middle + where] = changed[where - 2] = value
        (tmp_path / "a.zip").write_bytes(changed)
        with pytest.raises(UserError, match=f"a.zip cannot be unpacked .*{words}.*unpack it yourself"):
            unpack(tmp_path / "a.zip", tmp_path / "in")
    official.pack(tmp_path / "a.tgz", {"x" * 300: b"x"})
    with pytest.raises(UserError, match="holds a file name that is too long"):
        unpack(tmp_path / "a.tgz", tmp_path / "in")


def test_two_processes_do_not_fill_one_folder(tmp_path):
    official.pack(tmp_path / "a.tgz", {"jpg/1.jpg": b"1"})
    with downloads.writing_alone(tmp_path), pytest.raises(UserError, match="Another process is filling"):
        unpack(tmp_path / "a.tgz", tmp_path)
    unpack(tmp_path / "a.tgz", tmp_path)
    unpack(tmp_path / "a.tgz", tmp_path, wanted="jpg")  # the other process was faster
    fetch("http://127.0.0.1:9/file", tmp_path / "a.tgz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tgz", "jpg"]


def test_a_folder_that_is_there_but_not_whole_is_named(tmp_path):
    official.pack(tmp_path / "a.tgz", {"jpg/1.jpg": b"1"})
    (tmp_path / "jpg").mkdir()
    with pytest.raises(UserError, match="jpg is there, but not whole"):
        unpack(tmp_path / "a.tgz", tmp_path)
    assert not list((tmp_path / "jpg").iterdir())


class Files(BaseHTTPRequestHandler):
    """Sends `data`; breaks off after `pieces` bytes of a connection, or knows no ranges."""

    data, piece, ranges, asked, fails = b"", 0, True, [], []

    def log_message(self, *words):
        """Quiet."""

    def do_GET(self):
        if self.path != "/file":
            return self.send_error(404)
        if self.fails:
            self.send_response(self.fails.pop())
            self.send_header("Retry-After", "7")
            return self.end_headers()
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
        self.asked.append(start)
        if start >= len(self.data) and self.ranges:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.data)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.data) - start))
        self.end_headers()
        self.wfile.write(self.data[start : start + self.piece] if self.piece else self.data[start:])


@pytest.fixture
def server(monkeypatch):
    kind = type("Handler", (Files,), {"asked": [], "fails": [], "waits": []})
    http = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(downloads.time, "sleep", kind.waits.append)
    kind.url = f"http://127.0.0.1:{http.server_address[1]}/file"
    yield kind
    http.shutdown()
    http.server_close()


def test_a_broken_download_goes_on_where_it_broke_off(tmp_path, server):
    server.data, server.piece = bytes(range(256)) * 400, 30_000
    fetch(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.data and server.asked == [0, 30_000, 60_000, 90_000]
    assert not (tmp_path / "f.part").exists()
    (tmp_path / "g.part").write_bytes(server.data[:50_000])  # of a process that was killed
    server.piece = 0
    fetch(server.url, tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == server.data and server.asked[4:] == [50_000]
    (tmp_path / "h.part").write_bytes(server.data)  # killed between the last byte and the new name
    fetch(server.url, tmp_path / "h")
    assert (tmp_path / "h").read_bytes() == server.data
    (tmp_path / "i.part").write_bytes(server.data + b"more")  # of another file
    fetch(server.url, tmp_path / "i")
    assert (tmp_path / "i").read_bytes() == server.data


def test_a_busy_server_is_asked_again_when_it_says(tmp_path, server):
    server.data, server.fails[:] = b"0123456789", [503, 429, 500]
    fetch(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.data and server.waits == [7, 7, 7]
    server.fails[:] = [503] * 9
    with pytest.raises(UserError, match="nothing new in 5 attempts .status 503"):
        fetch(server.url, tmp_path / "g")
    assert len(server.fails) == 4


def test_a_server_without_ranges_sends_it_again(tmp_path, server):
    server.data, server.ranges = b"0123456789" * 1000, False
    (tmp_path / "f.part").write_bytes(b"xxxx")
    fetch(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.data


def test_a_download_that_does_not_work_ends_in_a_sentence(tmp_path, server):
    with pytest.raises(UserError, match="404.*data/README.md"):
        fetch(server.url + "s", tmp_path / "f")
    server.data, server.piece, server.ranges = b"0" * 1000, 10, False
    with pytest.raises(UserError, match="nothing new in 5 attempts .10 of 1000 bytes.*the same command goes on"):
        fetch(server.url, tmp_path / "f")
    assert not (tmp_path / "f").exists()
    with pytest.raises(UserError, match="nothing new in 5 attempts .ConnectionError"):
        fetch("http://127.0.0.1:9/file", tmp_path / "g")  # nobody listens there


def test_what_was_downloaded_is_checked(tmp_path, server, monkeypatch):
    official.make_flowers(tmp_path)
    server.data = (tmp_path / "102flowers.tgz").read_bytes()
    right = checksum(tmp_path / "102flowers.tgz")
    (tmp_path / "102flowers.tgz").unlink()
    others = [Remote(r.name, None, checksum(tmp_path / r.name)) for r in layouts.FLOWERS[1:]]
    wrong = "0" * 32
    monkeypatch.setattr(layouts, "FLOWERS", (Remote("102flowers.tgz", server.url, wrong), *others))
    options = {"download": True, "any_checksum": False}
    with pytest.raises(UserError, match=f"MD5 checksum {right}, the official one is {wrong}"):
        prepare("flowers", tmp_path, **options)
    assert not (tmp_path / "jpg").exists()
    monkeypatch.setattr(layouts, "FLOWERS", (Remote("102flowers.tgz", server.url, right), *others))
    assert len(prepare("flowers", tmp_path, **options)) == 306 and server.asked == [0]
