"""The released CLIP: its files, its tokenizer, and how they are fetched."""

import gzip
import hashlib
import http.server
import random
import threading
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_conformance_clip import IMAGE, TEXT, hugging_face, open_clip

from t2ilearn.data.captions import CaptionError
from t2ilearn.data.interface import Tokenizer
from t2ilearn.models.clip import CLIP
from t2ilearn.pretrained import clip, clip_tokenizer, download
from t2ilearn.pretrained.clip import RELEASED, clip_from_state, load_clip, read_released
from t2ilearn.pretrained.clip_tokenizer import END_TOKEN, START_TOKEN, CLIPTokenizer
from t2ilearn.pretrained.download import FILES, RemoteFile
from t2ilearn.pretrained.torchscript import read_torchscript
from t2ilearn.weights import WeightsError


@pytest.fixture
def small(monkeypatch):
    """A released model of small size, and its tensors by their names at open_clip."""
    monkeypatch.setitem(clip.RELEASED, "small", (IMAGE, TEXT))
    torch.manual_seed(0)
    return open_clip(IMAGE, TEXT)


def same(model, peer):
    wanted = clip_from_state(peer.state_dict(), IMAGE, TEXT).state_dict()
    assert all(torch.equal(t, wanted[key]) for key, t in model.state_dict().items())
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in model.state_dict().values())
    assert not model.training and all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------- files


def test_a_checkpoint_of_open_clip_is_read(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "a.pt")
    same(load_clip(tmp_path / "a.pt", "small"), small)


def test_a_checkpoint_of_data_parallel_training_is_read(small, tmp_path):
    state = {f"module.{key}": value for key, value in small.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.pt")
    same(load_clip(tmp_path / "a.pt", "small"), small)


def test_half_precision_becomes_float32(small, tmp_path):
    half = small.half()
    torch.save(half.state_dict(), tmp_path / "a.pt")
    same(load_clip(tmp_path / "a.pt", "small"), half)


def test_a_file_of_hugging_face_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(clip.RELEASED, "small", (IMAGE, TEXT))
    peer = hugging_face(IMAGE, TEXT)
    state = dict(peer.state_dict())
    for tower in ("text", "vision"):  # as older files have
        state[f"{tower}_model.embeddings.position_ids"] = torch.arange(5)
    save_file(state, tmp_path / "model.safetensors")
    same(load_clip(tmp_path / "model.safetensors", "small"), peer)


@pytest.fixture
def scripted(small, tmp_path):
    """The model as OpenAI released theirs: TorchScript in half precision."""
    captions = torch.full((2, TEXT.text_length), TEXT.end_token)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(small, (torch.zeros(2, 3, 16, 16), captions), check_trace=False)
        torch.jit.save(traced.half(), tmp_path / "ViT.pt")
    return tmp_path / "ViT.pt"


def test_torchscript_is_read_without_its_program(small, scripted, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program is loaded"))
    state = read_torchscript(scripted)
    assert {key: t for key, t in state.items() if "attn_mask" not in key}.keys() == (
        small.state_dict().keys()
    )
    same(load_clip(scripted, "small"), small)


def test_a_damaged_torchscript_says_so(scripted):
    data = bytearray(scripted.read_bytes())
    scripted.write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match="ViT.pt is (not loaded|missing|truncated)"):
        load_clip(scripted, "small")


def test_torchscript_with_a_foreign_name_is_refused(scripted, tmp_path):
    import zipfile

    evil = tmp_path / "evil.pt"
    with zipfile.ZipFile(scripted) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                data = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
            target.writestr(name, data)
    with pytest.raises(WeightsError, match="os.system|posix.system"):
        read_torchscript(evil)


def test_loading_is_strict(small):
    state = dict(small.state_dict())
    del state["visual.ln_pre.bias"]
    state["extra"] = torch.ones(2)
    state["text_projection"] = torch.ones(3, 3)
    with pytest.raises(WeightsError) as error:
        clip_from_state(state, IMAGE, TEXT)
    for part in ("missing visual.ln_pre.bias", "left over extra", "text_projection is (3, 3)"):
        assert part in str(error.value)


def test_other_tensors_and_names_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="neither visual.conv1.weight .* nor vision_model"):
        clip_from_state({"x": torch.ones(1)}, IMAGE, TEXT)
    with pytest.raises(WeightsError, match="No released CLIP is called 'B'. There are: ViT-B-32"):
        load_clip(tmp_path, "B")
    with pytest.raises(WeightsError, match="There is no file"):
        load_clip(tmp_path / "no.pt")
    with pytest.raises(WeightsError, match="There is no file"):
        read_released(tmp_path / "no.safetensors")


def test_vit_b_32_has_the_released_size():
    with torch.device("meta"):
        model = CLIP(*RELEASED["ViT-B-32"])
    assert sum(p.numel() for p in model.parameters()) == 151_277_313


# ---------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def vocabulary():
    """The file of merges that open_clip's wheel holds."""
    peer = pytest.importorskip("open_clip.tokenizer")
    path = Path(peer.default_bpe())
    data = path.read_bytes()
    stated = FILES["clip-vocabulary"]
    assert len(data) == stated.size and hashlib.sha256(data).hexdigest() == stated.sha256
    return path


@pytest.fixture(scope="module")
def pair(vocabulary):
    """Ours with ftfy's repairs, ours without, and open_clip's."""
    ftfy = pytest.importorskip("ftfy")
    peer = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    ours = CLIPTokenizer.from_file(vocabulary, repair=ftfy.fix_text)
    return ours, CLIPTokenizer.from_file(vocabulary), peer


def random_texts(n):
    """Latin text, words of all scripts, anything that Unicode assigns; some of it is too long.

    Not what this Python's Unicode leaves unassigned: the two sides know different versions of it.
    """
    draw = random.Random(0)
    any_character = [
        chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    words = (
        "a Photo of DON'T they've 3.14 naïve Straße 中文 привет 🙂 &amp; &lt;b&gt; \t\n x² ½".split(
            " "
        )
    )
    for number in range(n):
        length = draw.randrange(40)
        if number % 3 == 0:
            yield " ".join(draw.choice(words) for _ in range(length))
        elif number % 3 == 1:
            yield "".join(chr(draw.randrange(32, 0x250)) for _ in range(length))
        else:
            parts = (draw.choice(any_character) for _ in range(length))
            yield "".join(p + " " * (draw.random() < 0.2) for p in parts)


def test_random_unicode_gets_open_clip_s_tokens(pair):
    ours, _, peer = pair
    texts = list(random_texts(1500))
    mine = ours.encode(texts, truncate=True)
    assert mine.dtype == torch.int64 and mine.shape == (1500, 77)
    assert torch.equal(mine, peer(texts))
    assert (mine[:, -1] == END_TOKEN).any()  # some were cut


def test_without_repairs_text_that_needs_none_gets_the_same_tokens(pair):
    import ftfy

    _, plain, peer = pair
    texts = [text for text in random_texts(1500) if ftfy.fix_text(text) == text]
    assert len(texts) > 500
    assert torch.equal(plain.encode(texts, truncate=True), peer(texts))
    curly = ["it’s a star"]
    assert not torch.equal(plain.encode(curly), peer(curly))


def test_the_frame_of_a_caption(vocabulary):
    tokenizer = CLIPTokenizer.from_file(vocabulary, length=8)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocabulary, tokenizer.length) == (49408, 8)
    assert (tokenizer.start, tokenizer.end) == (START_TOKEN, END_TOKEN) == (49406, 49407)
    assert RELEASED["ViT-B-32"][1].end_token == END_TOKEN
    (empty, cat) = tokenizer.encode(["", "a  Photo of a CAT"]).tolist()
    assert empty == [START_TOKEN, END_TOKEN, 0, 0, 0, 0, 0, 0]
    assert cat == [START_TOKEN, 320, 1125, 539, 320, 2368, END_TOKEN, 0]
    (plain,) = tokenizer.encode(["<end_of_text>"], truncate=True).tolist()
    assert plain.count(END_TOKEN) == 1


def test_captions_that_are_too_long_are_an_error_or_cut_as_stated(vocabulary):
    tokenizer = CLIPTokenizer.from_file(vocabulary, length=8)
    text = "a photo of a cat on a mat"
    with pytest.raises(CaptionError, match="8 pieces; at most 6 fit.*truncate=True"):
        tokenizer.encode([text])
    (cut,) = tokenizer.encode([text], truncate=True).tolist()
    assert cut == [START_TOKEN, 320, 1125, 539, 320, 2368, 525, END_TOKEN]
    with pytest.raises(CaptionError, match="half of a Unicode pair"):
        tokenizer.encode(["\ud83d star"])
    with pytest.raises(ValueError, match="three ids at least, not 2"):
        CLIPTokenizer.from_file(vocabulary, length=2)


def test_merges_are_read_from_text_as_well(vocabulary, tmp_path):
    text = gzip.decompress(vocabulary.read_bytes())
    (tmp_path / "merges.txt").write_bytes(text)
    read = clip_tokenizer.read_merges
    assert read(tmp_path / "merges.txt") == read(vocabulary)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"#version\na b\n", "has not 48,894 lines"),
        (gzip.compress(b"x" * 999)[:-9], "damaged"),
        (b"\xff\xfe\xff", "damaged"),
        (b"v\n" + b"one\n" * 50_000, "two pieces each"),
    ],
    ids=["too short", "cut archive", "not UTF-8", "one piece a line"],
)
def test_other_vocabularies_are_refused(tmp_path, data, said):
    (tmp_path / "v.gz").write_bytes(data)
    with pytest.raises(WeightsError, match=said):
        CLIPTokenizer.from_file(tmp_path / "v.gz")
    with pytest.raises(WeightsError, match='There is no file.*download\\("clip-vocabulary"\\)'):
        CLIPTokenizer.from_file(tmp_path / "none.gz")


# ---------------------------------------------------------------- downloads

CONTENT = bytes(range(256)) * 4000  # about a megabyte


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; `cut` ends a transfer after so many bytes."""

    ranges, cut, body = True, None, CONTENT
    seen: list = []

    def do_GET(self):
        cls = type(self)
        wanted = self.headers.get("Range")
        cls.seen.append(wanted)
        if self.path.endswith("missing"):
            self.send_error(404)
            return
        start = int(wanted[6:-1]) if wanted and cls.ranges else 0
        part = cls.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part if cls.cut is None else part[: cls.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of this test alone, and its file under the name "file"."""

    class Mine(Server):
        seen: list = []

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    thread = threading.Thread(target=host.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{host.server_port}/x/file.bin"
    remote = RemoteFile(address, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "MIT")
    monkeypatch.setitem(FILES, "file", remote)
    Mine.remote = remote
    yield Mine
    host.shutdown()
    host.server_close()


def fetch(folder):
    return download.download("file", folder, progress=False)


def test_a_download_is_written_once(server, tmp_path):
    path = fetch(tmp_path / "new")
    assert path == tmp_path / "new" / "file.bin" and path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert fetch(tmp_path / "new") == path and server.seen == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_cut_goes_on(server, tmp_path, ranges):
    server.cut, server.ranges = 300_000, ranges
    with pytest.raises(WeightsError, match="ended 724,000 bytes early; 300,000 bytes are there"):
        fetch(tmp_path)
    assert not (tmp_path / "file.bin").exists()
    server.cut = None
    assert fetch(tmp_path).read_bytes() == CONTENT
    assert server.seen == [None, "bytes=300000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_another_file_is_refused_and_removed(server, tmp_path):
    server.body = CONTENT[:-1] + b"x"
    with pytest.raises(WeightsError, match="another file than .*its SHA-256 is"):
        fetch(tmp_path)
    assert not list(tmp_path.iterdir())
    server.body = CONTENT
    assert fetch(tmp_path).read_bytes() == CONTENT


def test_a_whole_part_is_checked_and_moved(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch(tmp_path).read_bytes() == CONTENT and server.seen == []


def test_a_file_in_place_that_is_damaged_is_reported_and_kept(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(WeightsError, match="file.bin is another file.*Remove it"):
        fetch(tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"mine" and server.seen == []


def test_a_server_without_the_file_says_so(server, tmp_path, monkeypatch):
    address = server.remote.address.replace("file.bin", "missing")
    monkeypatch.setitem(FILES, "file", RemoteFile(address, 5, "0" * 64, "MIT"))
    with pytest.raises(WeightsError, match="the server says 404"):
        fetch(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ViT-B-32", "clip-vocabulary"])
def test_without_internet_one_sentence_says_what_to_fetch(tmp_path, name):
    with pytest.raises(WeightsError) as error:
        download.download(name, tmp_path, progress=False)
    said, wanted = str(error.value), FILES[name]
    assert said.count(". ") == 0 and said.endswith(".")
    for part in (wanted.address, wanted.sha256, "MiB", str(tmp_path / wanted.file_name)):
        assert part in said
    assert not list(tmp_path.iterdir())


def test_the_address_of_vit_b_32_holds_its_sha256():
    wanted = FILES["ViT-B-32"]
    assert wanted.sha256 in wanted.address and "337.6 MiB" in str(wanted)
    pretrained = pytest.importorskip("open_clip.pretrained")
    assert pretrained.get_pretrained_url("ViT-B-32-quickgelu", "openai") == wanted.address


def test_names_and_places(monkeypatch, tmp_path):
    with pytest.raises(WeightsError, match="'B' is|Nothing is called 'B'. There are: ViT-B-32"):
        download.download("B", tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert download.default_folder() == tmp_path / "t2ilearn"
