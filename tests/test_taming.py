"""The released VQGANs: their layout, their quantizer, and files that may not be what they say."""

import collections
import dataclasses
import io
import math
import os
import pickle
import sys
import types
import typing
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2ilearn import foreign
from t2ilearn.foreign import read_checkpoint
from t2ilearn.taming import RELEASED, GumbelQuantizer, TamingConfig, TamingDecoder, TamingEncoder
from t2ilearn.vqgan import VQGAN
from t2ilearn.weights import WeightsError, load_taming, taming_key

SMALL = TamingConfig(16, 32, (1, 2), 1, (8,), codes=7, code_dim=5)
GUMBEL = dataclasses.replace(SMALL, quantizer="gumbel")


# ---------------------------------------------------------------- sizes


def test_the_released_models_have_the_sizes_that_their_names_say():
    for name, codes, f in [
        ("f16-1024", 1024, 16),
        ("f16-16384", 16384, 16),
        ("gumbel-f8", 8192, 8),
    ]:
        config = RELEASED[name]
        assert (config.codes, config.shrink, config.side) == (codes, f, 256 // f)
        assert config.code_dim == 256 and config.attention_at == (256 // f,)
        assert config.beta == 0.25 and not config.cosine
        with torch.device("meta"):
            model = VQGAN(config)
        assert 68e6 < sum(p.numel() for p in model.parameters()) < 77e6


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"channels": 48}, "multiple of 32, not 48"),
        ({"channels": 0}, "multiple of 32, not 0"),
        ({"multipliers": ()}, "from 1 up"),
        ({"multipliers": (1, 0)}, "from 1 up"),
        ({"resolution": 250}, "5 levels halve the side 4 times.*multiple of 16, not 250"),
        ({"resolution": 8}, "multiple of 16, not 8"),
        ({"attention_at": (16, 20)}, r"\(256, 128, 64, 32, 16\), and not all of \(16, 20\)"),
        ({"quantizer": "ema"}, "'gumbel'.*not 'ema'"),
        ({"codes": 1}, "two codes"),
        ({"code_dim": 0}, "one number"),
        ({"blocks": 0}, "one block"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        TamingConfig(**wrong)


# ---------------------------------------------------------------- layout


def test_encoder_and_decoder_meet_at_the_grid_of_codes(generator):
    encoder, decoder = TamingEncoder(SMALL), TamingDecoder(SMALL)
    for sides in ((16, 16), (8, 24)):  # of any shape that f divides
        x = torch.randn(2, 3, *sides, generator=generator)
        z = encoder(x)
        assert z.shape == (2, 5, sides[0] // 2, sides[1] // 2)
        assert decoder(z).shape == x.shape


def test_attention_follows_every_block_at_its_sides_and_nowhere_else():
    config = TamingConfig(32, 32, (1, 2, 2), 2, attention_at=(32, 8), codes=7, code_dim=5)
    for network, blocks in ((TamingEncoder(config), 2), (TamingDecoder(config), 3)):
        counts = [
            sum(not isinstance(layer, nn.Identity) for layer in level.attentions)
            for level in network.levels
        ]
        assert counts == [blocks, 0, blocks]
        assert [len(level.blocks) for level in network.levels] == 3 * [blocks]


def test_halving_pads_on_the_right_and_below(generator):
    resize = TamingEncoder(SMALL).levels[0].resize
    x = torch.randn(1, 32, 6, 6, generator=generator)
    weight, bias = resize[1].weight, resize[1].bias
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
    assert torch.equal(resize(x), expected) and expected.shape == (1, 32, 3, 3)


def test_nothing_clamps_the_picture():
    decoder = TamingDecoder(SMALL)
    nn.init.constant_(decoder.conv_out.bias, 5.0)
    assert decoder(torch.zeros(1, 5, 2, 2)).max() > 2


def test_the_last_four_dimensional_weight_is_the_last_layer_s():
    model = VQGAN(SMALL)
    assert model.last_layer is model.decoder.conv_out.weight


@pytest.mark.parametrize("config", [SMALL, GUMBEL], ids=["gradient", "gumbel"])
def test_tokens_decode_to_what_the_model_reconstructs(config, generator):
    model = VQGAN(config).eval()
    x = 2 * torch.rand(2, 3, 16, 16, generator=generator) - 1
    with torch.no_grad():
        codes, output = model.tokens(x), model(x)
        assert codes.shape == (2, 64) and torch.equal(codes, output.quantized.codes.flatten(1))
        assert torch.allclose(model.decode_tokens(codes), output.reconstruction, atol=1e-5)


# ---------------------------------------------------------------- the Gumbel quantizer


@pytest.fixture
def gumbel():
    """A quantizer, and encodings for it."""
    torch.manual_seed(0)
    return GumbelQuantizer(7, 5), torch.randn(3, 5, 4, 4)


def test_in_evaluation_the_most_likely_code_is_taken(gumbel):
    quantizer, z = gumbel[0].eval(), gumbel[1]
    first, second = quantizer(z), quantizer(z)
    assert torch.equal(first.codes, quantizer.proj(z).argmax(1))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.codes, quantizer.nearest(z))
    assert torch.equal(first.z_q, quantizer.embed.weight[first.codes].movedim(-1, 1))
    assert torch.equal(first.z_q, quantizer.look_up(first.codes)) and first.commitment == 0


def test_in_training_codes_are_drawn_as_often_as_they_are_likely(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1][:1, :, :1, :1]
    codes = quantizer(z.expand(1, 5, 200, 200)).codes
    shares = torch.bincount(codes.flatten(), minlength=7) / codes.numel()
    assert torch.allclose(shares, quantizer.proj(z).softmax(1).flatten(), atol=0.01)


def test_drawn_codes_are_whole_and_repeat_with_the_seed(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1]
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(quantizer(z))
    assert torch.equal(outputs[0].codes, outputs[1].codes)
    assert not torch.equal(outputs[0].codes, quantizer(z).codes)
    assert torch.allclose(outputs[0].z_q, quantizer.look_up(outputs[0].codes), atol=1e-6)


def test_gradients_reach_logits_codes_and_encodings_in_training(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1].requires_grad_()
    quantizer(z).z_q.square().sum().backward()
    for tensor in (z, *quantizer.parameters()):
        assert tensor.grad.abs().max() > 0


def test_the_temperature_softens_the_gradient(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1]
    norms = []
    for temperature in (0.5, 50.0):
        quantizer.temperature = temperature
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad(quantizer(z).z_q.square().sum(), quantizer.proj.weight)
        norms.append(grad.norm())
    assert norms[0] > 10 * norms[1]


def test_the_kl_term_is_0_for_a_toss_up_and_ln_k_for_certainty(gumbel):
    quantizer, z = GumbelQuantizer(7, 5, kl_weight=0.5), gumbel[1]
    nn.init.zeros_(quantizer.proj.weight)
    nn.init.zeros_(quantizer.proj.bias)
    assert quantizer(z).codebook.abs() < 1e-6
    nn.init.constant_(quantizer.proj.bias[:1].detach(), 1000.0)
    assert quantizer(z).codebook.item() == pytest.approx(0.5 * math.log(7))


def test_logits_stay_precise_under_autocast(gumbel):
    quantizer, z = gumbel[0].eval(), gumbel[1]
    with torch.autocast("cpu", torch.bfloat16):
        low = quantizer(z.bfloat16())
    assert low.z_q.dtype == torch.float32
    assert torch.equal(low.codes, quantizer(z.bfloat16().float()).codes)


# ---------------------------------------------------------------- files that are what they say


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


def test_a_module_s_own_state_with_its_metadata_is_read(saved):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    back = read_checkpoint(str(saved(model.state_dict())))
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_trainers_leave_beside_the_tensors_becomes_stubs(saved, lightning, protocol):
    content = {
        "epoch": 3,
        "callbacks": {lightning[0]: {"best": lightning[1], "score": torch.ones(1)}},
        "metrics": [np.float64(0.5), np.arange(3), np.dtype("f4")],
        "options": collections.defaultdict(list, {"kind": typing.Any, "of": [int, str, dict]}),
        "seen": {1, 2},
        "state_dict": {"x": torch.ones(2)},
    }
    assert read_checkpoint(saved(content, pickle_protocol=protocol))["x"].tolist() == [1, 1]


def test_optimiser_states_are_not_even_read(saved):
    path = saved({"state_dict": {"x": torch.ones(2)}, "optimizer_states": [torch.ones(9)]})
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            if len(data) != 9 * 4:
                file.writestr(name, data)
    assert read_checkpoint(path)["x"].tolist() == [1, 1]


# ---------------------------------------------------------------- files that want to run something


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
        with pytest.raises(WeightsError, match=r"wants to run (posix|nt|builtins)\.(mkdir|exec)"):
            read_checkpoint(path)
        assert not made.exists()
    torch.load(path, weights_only=False)  # the same file in trusting hands
    assert made.exists()


def archive(path, data_pkl, parts=(), compression=zipfile.ZIP_STORED):
    """A zip laid out as torch.save does it."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data_pkl)
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
        "torch._utils._rebuild_qtensor",
        "numpy_.x",
        "collections.OrderedDict.update",
        "t2ilearn.foreign._Stub",
    ],
)
def test_only_three_functions_are_known(tmp_path, wanted):
    module, name = wanted.rsplit(".", 1)
    path = archive(tmp_path / "x.pth", f"c{module}\n{name}\n(tR.".encode())
    said = wanted.replace("__builtin__", "builtins").replace(".", r"\.")
    with pytest.raises(WeightsError, match=rf"x\.pth is not loaded.*wants to run {said}; refused"):
        read_checkpoint(path)


def test_a_stub_takes_everything_and_calls_nothing(tmp_path):
    # REDUCE, then BUILD, SETITEMS, APPENDS and ADDITEMS on what came of it, and a call of that.
    made = (
        b"\x80\x04cnumpy\nanything\n(Vx\ntR}(Va\nI1\nub(Va\nI1\nu"
        b"(I1\nI2\ne(I1\nI2\n\x90(I3\ntR0}(Vx\nI1\nu."
    )
    with pytest.raises(WeightsError, match="no named tensors"):
        read_checkpoint(archive(tmp_path / "x.pth", made))


def test_nothing_can_be_hung_on_what_the_reader_knows(tmp_path):
    # BUILD sets attributes: here a function's defaults, or those of a class.
    for known in ("torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "numpy\nx"):
        hang = f"\x80\x02c{known}\nN}}(V__defaults__\n(I1\ntV__init__\nI1\nu\x86b.".encode("latin1")
        with pytest.raises(WeightsError, match="makes no sense|no named tensors"):
            read_checkpoint(archive(tmp_path / "x.pth", hang))
    assert foreign._Unpickler._describe.__defaults__ is None
    assert foreign._Entries.__init__ is dict.__init__ and callable(foreign._Stub.__init__)


# ---------------------------------------------------------------- files that lie, or are broken


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


def test_a_true_description_is_believed(tmp_path):
    path = describing(tmp_path / "x.pth", Described(1, (2, 2), (1, 1)))
    with pytest.raises(WeightsError, match=r"size \(2, 2\) does not fit its 1 numbers|part 0"):
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
def test_a_description_that_cannot_be_true_is_refused(tmp_path, tensor):
    with pytest.raises(WeightsError, match=r"x\.pth is (not loaded|damaged)"):
        read_checkpoint(describing(tmp_path / "x.pth", tensor))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_say_so(saved, share):
    path = saved({"x": torch.ones(1000)})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(WeightsError, match="last.ckpt is truncated or damaged.*Fetch it again"):
        read_checkpoint(path)


def test_one_flipped_bit_is_seen(saved):
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
def test_what_is_no_checkpoint_says_so(tmp_path, data, said):
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=rf"x\.ckpt is .*{said}"):
        read_checkpoint(path)


@pytest.mark.parametrize("data_pkl", [b"", b"\x80\x02}", b"0", b"garbage", b"\x80\x02]q\x00a."])
def test_a_pickle_that_makes_no_sense_is_damaged(tmp_path, data_pkl):
    with pytest.raises(WeightsError, match=r"x\.pth is damaged: it makes no sense"):
        read_checkpoint(archive(tmp_path / "x.pth", data_pkl))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"no file .*no\.ckpt"):
        read_checkpoint(tmp_path / "no.ckpt")
    with pytest.raises(WeightsError, match="is a folder; give the checkpoint in it"):
        read_checkpoint(tmp_path)


def test_pickles_of_before_the_zip_say_how_to_save_anew(saved):
    path = saved({"x": torch.ones(99)}, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="bare pickle.*before 1.6.*weights_only=True"):
        read_checkpoint(path)


def test_torchscript_says_what_to_fetch_instead(tmp_path):
    path = archive(tmp_path / "ViT-B-32.pt", b"\x80\x02}.", {"constants.pkl": b"\x80\x02)."})
    with pytest.raises(WeightsError, match="TorchScript.*model.safetensors.*last.ckpt"):
        read_checkpoint(path)


def test_zips_that_torch_save_did_not_write_say_so(tmp_path):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model.yaml", 99 * "a")
    with pytest.raises(WeightsError, match="not one that torch.save wrote"):
        read_checkpoint(path)
    path = describing(path, Described(0, (4,), (1,)), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed it after torch.save"):
        read_checkpoint(path)


def test_another_byte_order_is_refused(tmp_path):
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    path = archive(tmp_path / "x.pth", b"\x80\x02}.", {"byteorder": other})
    with pytest.raises(WeightsError, match="byte order"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [{}, {"a": 1}, [torch.ones(1)], torch.ones(1), {"state_dict": 3}]
)
def test_files_without_named_tensors_say_so(saved, content):
    with pytest.raises(WeightsError, match="no named tensors|makes no sense"):
        read_checkpoint(saved(content))


# ---------------------------------------------------------------- taming's names


def test_our_names_become_those_of_the_released_files():
    with torch.device("meta"):
        ours = VQGAN(RELEASED["f16-1024"]).state_dict()
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
    model = VQGAN(request.param)
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


def test_a_loaded_model_can_learn(released, saved):
    loaded = load_taming(saved(released[1]), "small").train()
    optimizer = torch.optim.Adam(loaded.parameters(), 1e-3)
    x = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    losses = []
    for _ in range(4):
        output = loaded(x)
        loss = (output.reconstruction - x).abs().mean() + output.quantized.codebook
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


def test_the_wrong_model_s_name_gives_a_short_list(released, saved):
    path = saved(released[1])
    with pytest.raises(WeightsError, match=r"(?s)do not fit 'gumbel-f8'.*and \d+ more$") as caught:
        load_taming(path, "gumbel-f8")
    assert len(str(caught.value).splitlines()) == 22
    with pytest.raises(
        WeightsError, match="called 'f16'. There are: f16-1024, f16-16384, gumbel-f8"
    ):
        load_taming(path, "f16")
