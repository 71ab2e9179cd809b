"""Checkpoints of other people: sound ones load exactly, and nothing that a file holds is run."""

import collections
import dataclasses
import io
import os
import pickle
import sys
import types
import typing
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from t2ilearn.models.taming import RELEASED, TamingConfig, make_taming_vqgan
from t2ilearn.pretrained import checkpoints, lpips
from t2ilearn.pretrained.checkpoints import read_checkpoint
from t2ilearn.pretrained.lpips import lpips_channel_weights
from t2ilearn.pretrained.taming import load_taming, taming_key
from t2ilearn.weights import WeightsError

SMALL = TamingConfig(16, 32, (1, 2), 1, (8,), codebook_size=7, code_dim=5)
GUMBEL = dataclasses.replace(SMALL, quantizer="gumbel")


# ---------------------------------------------------------------- sound files


@pytest.fixture
def saved(tmp_path):
    """A function that writes something as torch.save does, and returns the path."""

    def save(content, name="last.ckpt", **how):
        torch.save(content, tmp_path / name, **how)
        return tmp_path / name

    return save


def pretend_lightning(patch: pytest.MonkeyPatch) -> type:
    """A class that pickles as Lightning's callback, which the released files hold."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        patch.setitem(sys.modules, part, types.ModuleType(part))
    kind = type("ModelCheckpoint", (), {"__module__": name, "best": None})
    sys.modules[name].ModelCheckpoint = kind
    return kind


@pytest.fixture
def lightning(monkeypatch):
    """The class, and an object of it with a state."""
    kind = pretend_lightning(monkeypatch)
    callback = kind()
    callback.best = torch.ones(1)
    return kind, callback


def test_tensors_of_every_kind_and_layout_come_back(saved):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "whole": base,
        "turned": base.T,
        "part": base[1:3, ::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.float16),
        "bfloat": torch.ones(3, dtype=torch.bfloat16),
        "double": torch.ones(3, dtype=torch.float64),
        "long": torch.tensor([2**40, -1]),
        "bytes": torch.tensor([255, 0], dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
    }
    for content in (state, {"state_dict": state, "other": torch.ones(1)}):
        back = read_checkpoint(saved(content))
        assert back.keys() == state.keys()
        for name, tensor in state.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_the_state_of_a_module_with_its_metadata_is_read(saved):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    back = read_checkpoint(str(saved(model.state_dict())))
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_objects_of_trainers_beside_the_tensors_are_read_as_stubs(saved, lightning):
    content = {
        "epoch": 3,
        "callbacks": {lightning[0]: {"best": lightning[1], "score": torch.ones(1)}},
        "metrics": [np.float64(0.5), np.arange(3), np.dtype("f4")],
        "options": collections.defaultdict(list, {"kind": typing.Any, "of": [int, str, dict]}),
        "seen": {1, 2},
        "state_dict": {"x": torch.ones(2)},
    }
    before = set(torch.serialization.get_safe_globals())
    assert read_checkpoint(saved(content))["x"].tolist() == [1, 1]
    assert set(torch.serialization.get_safe_globals()) == before  # the allow-list is gone again


def test_configurations_of_omegaconf_are_read_as_stubs(saved):
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"model": {"n_embed": 16384, "names": ["a", 1.5, True]}})
    content = {"hyper_parameters": config, "state_dict": {"x": torch.ones(2)}}
    assert read_checkpoint(saved(content))["x"].tolist() == [1, 1]


def test_every_listed_name_may_stand_in_a_file(tmp_path):
    for listed in (checkpoints.STUBBED, checkpoints.MAPPINGS):
        for module, names in listed.items():
            for name in names.split():
                called = b"\x80\x02" + f"c{module}\n{name}\n".encode() + CALL + b"."
                with pytest.raises(WeightsError, match="no named tensors"):
                    read_checkpoint(archive(tmp_path / "x.pth", called))


def test_optimiser_states_are_not_returned(saved):
    path = saved({"state_dict": {"x": torch.ones(2)}, "optimizer_states": [torch.ones(9)]})
    assert {name: t.tolist() for name, t in read_checkpoint(path).items()} == {"x": [1, 1]}


def test_tensors_do_not_depend_on_the_file_any_more(saved):
    path = saved({"x": torch.ones(1000)})
    tensor = read_checkpoint(path)["x"]
    path.write_bytes(bytes(path.stat().st_size))
    assert tensor.untyped_storage().nbytes() == 4000 and torch.equal(tensor, torch.ones(1000))


def test_another_pickle_protocol_is_named_as_a_possible_cause(saved):
    path = saved({"x": torch.ones(2)}, pickle_protocol=4)
    with pytest.raises(WeightsError, match="another `pickle_protocol` than torch.save's own, 2"):
        read_checkpoint(path)


# ---------------------------------------------------------------- files with code


class Runs:
    """Pickled, a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_file_that_carries_code_is_named_and_not_run(saved, tmp_path):
    made = tmp_path / "made"
    for content in (
        {"state_dict": {"x": torch.ones(1)}, "also": Runs(os.mkdir, str(made))},
        {"x": torch.ones(1), "y": Runs(exec, f"import os; os.mkdir({str(made)!r})")},
    ):
        path = saved(content)
        with pytest.raises(WeightsError, match=r"refers to ((posix|nt)\.mkdir|exec), which"):
            read_checkpoint(path)
        assert not made.exists()
    torch.load(path, weights_only=False)  # the same file read without protection
    assert made.exists()


A = b"X\x01\x00\x00\x00a"  # pickle's opcodes for the string "a"
CALL = A + b"\x85R"  # what lies on the stack, called with "a"


def archive(path, data_pkl, parts=(), compression=zipfile.ZIP_STORED):
    """A zip laid out as torch.save does it."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data_pkl)
        file.writestr("archive/version", "3\n")
        for name, data in dict(parts).items():
            file.writestr(f"archive/{name}", data)
    return path


@pytest.mark.parametrize(
    "wanted",
    [
        "os.system",
        "posix.system",
        "builtins.eval",
        "__builtin__.getattr",
        "torch.load",
        "torch.hub.load",
        "torch.Tensor.__setstate__",
        "numpy.load",
        "numpy_.x",
        "omegaconf.OmegaConf.load",
        "pytorch_lightning.Trainer",
        "collections.OrderedDict.update",
        "t2ilearn.pretrained.checkpoints._Stub",
    ],
)
def test_functions_that_are_not_listed_are_refused_by_name(tmp_path, wanted):
    module, name = wanted.rsplit(".", 1)
    path = archive(tmp_path / "x.pth", f"c{module}\n{name}\n(tR.".encode())
    said = wanted.removeprefix("__builtin__.").removeprefix("builtins.").replace(".", r"\.")
    with pytest.raises(WeightsError, match=rf"not loaded: .* refers to {said}, which is refused"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "operations",
    [
        CALL + b"}(" + A + b"K\x01ub",  # REDUCE, then BUILD on what came of it
        CALL + b"}(" + A + b"K\x01ubb",
        CALL + b"(" + A + b"K\x01u",  # SETITEMS
        CALL + b"(K\x01K\x02e",  # APPENDS
        CALL + b"(K\x01K\x02\x90",  # ADDITEMS
        CALL + b"K\x03\x85R",  # a call of what came of it
    ],
)
def test_what_a_file_does_to_a_stub_has_no_effect_or_is_refused(tmp_path, operations):
    path = archive(tmp_path / "x.pth", b"\x80\x02cnumpy\nndarray\n" + operations + b".")
    with pytest.raises(WeightsError, match="no named tensors|makes no sense"):
        read_checkpoint(path)


def test_a_stub_accepts_everything_and_calls_nothing():
    stub = checkpoints._Stub(print, key=print)
    stub.__setstate__({"a": 1})
    assert vars(stub) == {} and checkpoints._MappingStub(list) == {}


def test_nothing_can_be_attached_to_what_the_reader_knows(tmp_path):
    # BUILD sets attributes: here a function's defaults, or those of a class.
    rebuild, entries = torch._utils._rebuild_tensor_v2, collections.OrderedDict
    before = rebuild.__defaults__, entries.__init__, checkpoints._Stub.__init__
    for known in ("torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "numpy\ndtype"):
        names = b"X\x0c\x00\x00\x00__defaults__K\x01\x85X\x08\x00\x00\x00__init__K\x01"
        hang = b"\x80\x02c" + known.encode() + b"\nN}(" + names + b"u\x86b."
        with pytest.raises(WeightsError, match="makes no sense|no named tensors"):
            read_checkpoint(archive(tmp_path / "x.pth", hang))
    assert before == (rebuild.__defaults__, entries.__init__, checkpoints._Stub.__init__)


@pytest.mark.parametrize(
    "tensor, said",
    [
        (lambda: torch.eye(2).to_sparse(), "stored as torch.sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "no plain tensor"),
        (lambda: torch.empty(2**50, device="meta"), "on meta"),
    ],
)
def test_only_dense_tensors_with_numbers_are_taken(saved, tensor, said):
    with pytest.raises(WeightsError, match=f"last.ckpt is not loaded: x is .*{said}"):
        read_checkpoint(saved({"x": tensor()}))


# ---------------------------------------------------------------- wrong descriptions, damage


class Described:
    """Pickled, a tensor of four numbers 0 … 3 with any offset, size and stride."""

    def __init__(self, *shape, numbers=4, key="0", kind=torch.FloatStorage):
        self.shape = shape
        self.storage = "storage", kind, key, "cpu", numbers

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Storage(self.storage), *self.shape, False, {})


class Storage:
    def __init__(self, pid):
        self.pid = pid


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None


def describing(path, tensor, **how):
    """A checkpoint of one tensor."""
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"x": tensor})
    return archive(path, buffer.getvalue(), {"data/0": torch.arange(4.0).numpy().tobytes()}, **how)


def test_a_correct_description_is_accepted(tmp_path):
    path = describing(tmp_path / "x.pth", Described(1, (2, 2), (1, 1)))
    with pytest.raises(WeightsError, match=r"makes no sense as a checkpoint \(RuntimeError"):
        read_checkpoint(describing(path, Described(0, (2, 2), (1, 1), numbers=1)))
    path = describing(path, Described(1, (3,), (1,)))
    assert read_checkpoint(path)["x"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "tensor",
    [
        Described(2, (3,), (1,)),
        Described(0, (5,), (1,)),
        Described(0, (2, 2), (3, 1)),
        Described(2**62, (1,), (1,)),
        Described(0, (2**62, 4), (0, 1)),
        Described(0, (10**9,), (0,)),
        Described(0, (2,), (2**70,)),
        Described(-1, (2,), (1,)),
        Described(0, (-2,), (1,)),
        Described(0, (2,), (-1,)),
        Described(0, (2,), (1, 1)),
        Described(0, (2.0,), (1,)),
        Described(0, "ab", (1, 1)),
        Described(0, 3, 1),
        Described(0, (2,), (1,), numbers=8),
        Described(0, (2,), (1,), numbers=-4),
        Described(0, (2,), (1,), kind=torch.DoubleStorage),
        Described(0, (2,), (1,), kind=dict),
        Described(0, (2,), (1,), key="1"),
        Described(0, (2,), (1,), key="../data.pkl"),
        Described(0, (2,), (1,), key=[]),
        Runs(torch._utils._rebuild_tensor_v2, 1),
        Runs(torch._utils._rebuild_tensor_v2, "a", 0, (1,), (1,)),
    ],
)
def test_a_description_that_cannot_be_correct_is_refused(tmp_path, tensor):
    with pytest.raises(WeightsError, match=r"x\.pth is (not loaded|damaged)"):
        read_checkpoint(describing(tmp_path / "x.pth", tensor))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_reported(saved, share):
    path = saved({"x": torch.ones(1000)})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(WeightsError, match="last.ckpt is truncated or damaged.*Fetch it again"):
        read_checkpoint(path)


def test_one_flipped_bit_is_detected(saved):
    path = saved({"x": torch.ones(1000)})
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(9).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="last.ckpt is truncated or damaged.*CRC"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "truncated: 0 bytes"),
        (b"PK\x03\x04", "truncated or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n" + 90 * b"0", "begins with b'version"),
        (b"<!DOCTYPE html>" + 90 * b" ", "no checkpoint of PyTorch"),
        (b"cos\nsystem\n(Vls\ntR." + 90 * b" ", "no checkpoint of PyTorch"),
    ],
)
def test_files_of_another_format_are_reported(tmp_path, data, said):
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=rf"x\.ckpt is .*{said}"):
        read_checkpoint(path)


@pytest.mark.parametrize("data_pkl", [b"", b"\x80\x02}", b"0", b"garbage", b"\x80\x02]q\x00a."])
def test_a_damaged_pickle_is_reported(tmp_path, data_pkl):
    with pytest.raises(WeightsError, match=r"x\.pth is damaged: it makes no sense"):
        read_checkpoint(archive(tmp_path / "x.pth", data_pkl))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"no file .*no\.ckpt"):
        read_checkpoint(tmp_path / "no.ckpt")
    with pytest.raises(WeightsError, match="is a folder; give the checkpoint in it"):
        read_checkpoint(tmp_path)


def test_the_error_for_files_before_the_zip_format_says_how_to_save_anew(saved):
    path = saved({"x": torch.ones(99)}, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="bare pickle.*before 1.6.*weights_only=True"):
        read_checkpoint(path)


def test_the_error_for_torchscript_says_what_to_fetch_instead(tmp_path):
    path = archive(tmp_path / "ViT-B-32.pt", b"\x80\x02}.", {"constants.pkl": b"\x80\x02)."})
    with pytest.raises(WeightsError, match="TorchScript.*model.safetensors.*last.ckpt"):
        read_checkpoint(path)


def test_zips_that_torch_save_did_not_write_are_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model.yaml", 99 * "a")
    with pytest.raises(WeightsError, match="not one that torch.save wrote"):
        read_checkpoint(path)
    path = describing(path, Described(0, (4,), (1,)), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed it after torch.save"):
        read_checkpoint(path)


def test_another_byte_order_is_turned_into_this_computers(saved):
    path = saved({"x": torch.tensor([1.0, 2.0])})
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            turned = np.frombuffer(data, "f4").byteswap().tobytes() if "/data/" in name else data
            file.writestr(name, other if name.endswith("byteorder") else turned)
    assert read_checkpoint(path)["x"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "content", [{}, {"a": 1}, [torch.ones(1)], torch.ones(1), {"state_dict": 3}]
)
def test_files_without_named_tensors_are_refused(saved, content):
    with pytest.raises(WeightsError, match="no named tensors|makes no sense"):
        read_checkpoint(saved(content))


# ---------------------------------------------------------------- taming's names


def test_our_names_become_those_of_the_released_files():
    with torch.device("meta"):
        ours = make_taming_vqgan(RELEASED["f16-1024"]).state_dict()
    names = {taming_key(name) for name in ours} - {"quantize.counts"}
    for name in (
        "encoder.conv_in.weight",
        "encoder.down.0.block.1.conv2.bias",
        "encoder.down.2.block.0.nin_shortcut.weight",
        "encoder.down.3.downsample.conv.weight",
        "encoder.down.4.attn.1.proj_out.weight",
        "encoder.mid.block_1.norm1.weight",
        "encoder.mid.attn_1.q.weight",
        "encoder.norm_out.bias",
        "quant_conv.weight",
        "quantize.embedding.weight",
        "post_quant_conv.bias",
        "decoder.mid.block_2.conv1.weight",
        "decoder.up.0.block.2.norm2.weight",
        "decoder.up.1.upsample.conv.bias",
        "decoder.up.4.attn.2.norm.weight",
        "decoder.conv_out.weight",
    ):
        assert name in names
    for name in ("encoder.down.4.downsample.conv.bias", "decoder.up.0.upsample.conv.weight"):
        assert name not in names
    assert len(names) == len(ours) - 1
    assert taming_key("quantizer.proj.weight") == "quantize.proj.weight"
    assert taming_key("quantizer.embed.weight") == "quantize.embed.weight"


@pytest.fixture(params=[SMALL, GUMBEL], ids=["gradient", "gumbel"])
def released(request, monkeypatch):
    """A small model in the place of a released one, and what its authors' file would hold."""
    monkeypatch.setitem(RELEASED, "small", request.param)
    torch.manual_seed(0)
    model = make_taming_vqgan(request.param)
    names = [name for name in model.state_dict() if name != "quantizer.counts"]
    return model, {taming_key(name): model.state_dict()[name].clone() for name in names}


def test_a_checkpoint_fills_the_whole_model(released, saved, lightning):
    model, state = released
    content = {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {lightning[0]: {"best": lightning[1]}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "lr_schedulers": [],
        "state_dict": state
        | {"loss.discriminator.main.0.weight": torch.ones(1)}
        | {"loss.perceptual_loss.net.slice1.0.weight": torch.ones(1)},
    }
    loaded = load_taming(saved(content), "small")
    assert not loaded.training and loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.device.type == "cpu" and tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    x = torch.zeros(1, 3, 16, 16)
    assert torch.equal(loaded.tokens(x), model.eval().tokens(x))


def test_a_bare_state_in_half_precision_loads_too(released, saved):
    model, state = released
    loaded = load_taming(saved({k: t.half() for k, t in state.items()}), "small")
    key = "decoder.conv_out.weight"
    assert torch.equal(loaded.state_dict()[key], model.state_dict()[key].half().float())


def test_a_loaded_model_can_be_trained(released, saved):
    loaded = load_taming(saved(released[1]), "small").train()
    optimizer = torch.optim.Adam(loaded.parameters(), 1e-3)
    x = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    losses = []
    for _ in range(4):
        output = loaded(x)
        loss = (output.reconstruction - x).abs().mean() + output.quantized.codebook_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_does_not_fit_is_named_as_the_file_names_it(released, saved):
    _, state = released
    state["encoder.down.7.conv.weight"] = state.pop("encoder.mid.attn_1.proj_out.weight")
    state["decoder.conv_out.weight"] = torch.ones(3, 64, 3, 3)
    state["quant_conv.bias"] = torch.ones(5, dtype=torch.int64)
    with pytest.raises(WeightsError) as caught:
        load_taming(saved({"state_dict": state}), "small")
    for part in (
        "do not fit 'small'",
        "last.ckpt is a checkpoint of another configuration",
        "missing encoder.mid.attn_1.proj_out.weight",
        "left over encoder.down.7.conv.weight",
        "decoder.conv_out.weight is (3, 64, 3, 3), not (3, 32, 3, 3)",
        "quant_conv.bias is torch.int64, not torch.float32",
    ):
        assert part in str(caught.value)


def test_the_name_of_another_model_gives_a_short_list(released, saved):
    path = saved(released[1])
    with pytest.raises(WeightsError, match=r"(?s)do not fit 'gumbel-f8'.*and \d+ more$") as caught:
        load_taming(path, "gumbel-f8")
    assert len(str(caught.value).splitlines()) == 22
    with pytest.raises(
        WeightsError, match="called 'f16'. There are: f16-1024, f16-16384, gumbel-f8"
    ):
        load_taming(path, "f16")


# ---------------------------------------------------------------- LPIPS


def test_lpips_has_a_weight_for_each_channel_of_five_levels():
    weights = lpips_channel_weights()
    assert [w.shape for w in weights] == [(64,), (128,), (256,), (512,), (512,)]
    assert all(w.dtype == torch.float32 and (w >= 0).all() for w in weights)


@pytest.mark.parametrize(
    "card, said",
    [
        ('{"sha256": "0000"}', "is damaged: its SHA-256"),
        ("{}", "does not state the SHA-256"),
        ("{", "does not state the SHA-256"),
        ("[1]", "does not state the SHA-256"),
    ],
)
def test_damaged_lpips_weights_are_reported(monkeypatch, tmp_path, card, said):
    (tmp_path / "lpips").mkdir()
    for file in (lpips.ASSETS / "lpips").iterdir():
        (tmp_path / "lpips" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "lpips" / "vgg.json").write_text(card, encoding="utf-8")
    monkeypatch.setattr(lpips, "ASSETS", tmp_path)
    with pytest.raises(WeightsError, match=said):
        lpips_channel_weights()
