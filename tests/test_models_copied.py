"""A chapter's model file, copied elsewhere with the siblings it imports, runs without the package.

Each chapter's files go into a package of another name in an empty folder; a process that cannot
import `t2ilearn` runs a forward pass and a loss there.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parent.parent / "t2ilearn" / "models"
ALLOWED = {"torch", "torchvision", "jaxtyping", *sys.stdlib_module_names}

CHAPTERS = {
    "vqvae": """
        from here.vqvae import VQVAE, VQVAEConfig, vqvae_loss
        for quantizer in ("ema", "gradient", "fsq"):
            config = VQVAEConfig(16, (8, 16), 1, 27, 3, quantizer)
            x = 2 * torch.rand(2, 3, 16, 16) - 1
            model = VQVAE.from_config(config)
            vqvae_loss(x, model(x)).total.backward()
            assert model.decode_tokens(model.tokens(x)).shape == x.shape
        """,
    "pixelcnn": """
        from here.pixelcnn import PixelCNN
        from here.transformer import PriorConfig, prior_loss
        model = PixelCNN(PriorConfig(7, 3, 8, 2, 2, vocabulary=11, text_length=4))
        indices, caption = torch.randint(7, (2, 9)), torch.randint(3, 11, (2, 4))
        prior_loss(model(indices, caption), indices).total.backward()
        """,
    "transformer": """
        from here.transformer import PriorConfig, TransformerPrior, prior_loss
        model = TransformerPrior(PriorConfig(7, 3, 8, 2, 2, vocabulary=11, text_length=4))
        indices, caption = torch.randint(7, (2, 9)), torch.randint(3, 11, (2, 4))
        prior_loss(model(indices, caption), indices).total.backward()
        """,
    "sampling": """
        from here.sampling import sample
        from here.transformer import PriorConfig, TransformerPrior
        model = TransformerPrior(PriorConfig(7, 3, 8, 2, 2))
        assert sample(model, count=2, generator=torch.Generator()).shape == (2, 9)
        """,
    "lpips": """
        import torchvision
        from here.lpips import VGGTrunk, perceptual_distance
        trunk = VGGTrunk(torchvision.models.vgg16(weights=None).features)
        x = 2 * torch.rand(2, 3, 32, 32) - 1
        assert perceptual_distance(trunk, x, x.flip(3)).shape == (2,)
        """,
    "vqgan": """
        from here.vqgan import *
        from here.vqvae import VQVAE, VQVAEConfig
        generator = VQVAE.from_config(VQVAEConfig(16, (8, 16), 1, 27, 3))
        discriminator = Discriminator(DiscriminatorConfig(4, 1))
        distance = lambda x, y: (x - y).abs().mean((1, 2, 3))
        pair = VQGANWithDiscriminator(generator, discriminator, VQGANLossConfig(), distance)
        pair(2 * torch.rand(2, 3, 16, 16) - 1, 0.9).total.backward()
        """,
    "taming": """
        from here.taming import TamingConfig, make_taming_vqgan
        for quantizer in ("gradient", "gumbel"):
            config = TamingConfig(16, 32, (1, 2), 1, (8,), 7, 5, quantizer)
            x = 2 * torch.rand(2, 3, 16, 16) - 1
            assert make_taming_vqgan(config)(x).reconstruction.shape == x.shape
        """,
    "dvae": """
        from here.dvae import DVAE, DVAEConfig, dvae_loss
        model, x = DVAE(DVAEConfig(16, (8, 16), 1, 6, 5)), 2 * torch.rand(2, 3, 16, 16) - 1
        dvae_loss(x, model(x, 0.5, generator=torch.Generator())).total.backward()
        """,
    "dalle": """
        from here.dalle import DALLE, dalle_loss
        from here.transformer import PriorConfig
        model = DALLE(PriorConfig(7, 3, 8, 2, 2, vocabulary=11, text_length=4))
        indices, caption = torch.randint(7, (2, 9)), torch.randint(3, 11, (2, 4))
        dalle_loss(model(indices, caption), caption, indices).total.backward()
        """,
    "noise_schedules": """
        from here.noise_schedules import cosine_alpha_bar
        assert 0 < cosine_alpha_bar(10)[-1] < cosine_alpha_bar(10)[0] < 1
        """,
    "diffusion": """
        from here.diffusion import RectifiedFlow, jit_loss
        net, x = torch.nn.Conv2d(3, 3, 1), 2 * torch.rand(2, 3, 8, 8) - 1
        jit_loss(lambda z, t: net(z), x, RectifiedFlow()).total.backward()
        """,
    "diffusion_samplers": """
        from here.diffusion import RectifiedFlow
        from here.diffusion_samplers import Denoiser, euler_steps, flow_times
        denoise = Denoiser(lambda z, t: 0 * z, RectifiedFlow(), "x0")
        *_, last = euler_steps(denoise, torch.randn(2, 3, 8, 8), flow_times(3))
        assert last.z.abs().max() < 1e-5
        """,
    "dit": """
        from here.dit import DiT, DiTConfig
        model = DiT(DiTConfig(16, 8, 32, 1, 1, 11, 4))
        z, caption = torch.randn(2, 3, 16, 16), torch.randint(3, 11, (2, 4))
        assert model(z, torch.rand(2), caption).shape == z.shape
        """,
    "diffusion_prior": """
        from here.diffusion_prior import (
            DiffusionPrior, DiffusionPriorConfig, diffusion_prior_loss, prior_process
        )
        model = DiffusionPrior(DiffusionPriorConfig(6, 32, 1, 11, 4))
        x, text, captions = torch.randn(2, 6), torch.randn(2, 6), torch.randint(3, 11, (2, 4))
        diffusion_prior_loss(model, x, text, captions, prior_process()).total.backward()
        """,
    "dalle2": """
        from here.dalle2 import Decoder, ImageConditioning, ImageConditioningConfig
        from here.dit import DiT, DiTConfig
        conditioning = ImageConditioning(ImageConditioningConfig(6, 32, 2))
        model = Decoder(DiT(DiTConfig(16, 8, 32, 1, 1, 11, 4)), conditioning)
        z, caption = torch.randn(2, 3, 16, 16), torch.randint(3, 11, (2, 4))
        assert model(z, torch.rand(2), torch.randn(2, 6), caption).shape == z.shape
        """,
    "unet": """
        from here.unet import UNet, UNetConfig
        model = UNet(UNetConfig(16, (32, 32), 1, 8, 1, 11, 4))
        z, caption = torch.randn(2, 3, 16, 16), torch.randint(3, 11, (2, 4))
        assert model(z, torch.rand(2), caption).shape == z.shape
        """,
    "clip": """
        from here.clip import CLIP, ImageTowerConfig, TextTowerConfig, clip_loss
        model = CLIP(ImageTowerConfig(16, 8, 8, 1, 2, 6), TextTowerConfig(9, 4, 8, 1, 2, 6))
        captions = torch.tensor([[3, 4, 1, 0], [5, 1, 0, 0]])
        clip_loss(model(2 * torch.rand(2, 3, 16, 16) - 1, captions)).total.backward()
        """,
    "cutouts": """
        from here.cutouts import CutoutConfig, make_cutouts
        pictures = 2 * torch.rand(2, 3, 16, 16) - 1
        assert make_cutouts(pictures, 8, CutoutConfig(3), torch.Generator()).shape == (6, 3, 8, 8)
        """,
    "vqgan_clip": """
        from here.vqgan_clip import *
        from here.vqvae import VQVAE, VQVAEConfig
        codec = codec_of(VQVAE.from_config(VQVAEConfig(16, (8, 16), 1, 27, 3)))
        generator, encode = torch.Generator(), lambda x: x.flatten(1)[:, :5]
        prompts = make_prompts([[(torch.ones(5), 1.0)]])
        configs = CutoutConfig(2), OptimisationConfig(1)
        start = start_from_noise(1, codec, generator)
        steps = list(optimise(start, codec, encode, prompts, 8, generator, *configs))
        assert len(steps) == 2
        """,
}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """The siblings that a file imports, and the top-level names of all else that it imports."""
    siblings, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module, f"{path.name} imports from above its folder"
            siblings.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            others.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return siblings, others


def with_siblings(name: str) -> set[str]:
    """A module, what it imports of its folder, and so on."""
    found, ahead = set(), {name}
    while ahead:
        found |= ahead
        ahead = set().union(*(imports_of(MODELS / f"{n}.py")[0] for n in ahead)) - found
    return found


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.py")), ids=lambda path: path.stem)
def test_a_model_file_imports_torch_torchvision_jaxtyping_and_siblings_only(path):
    assert imports_of(path)[1] <= ALLOWED


def test_siblings_do_not_import_each_other_in_a_circle():
    for path in MODELS.glob("*.py"):
        for sibling in imports_of(path)[0]:
            assert path.stem not in with_siblings(sibling), f"{path.stem} and {sibling}"


# Each chapter in a package of its own, all in one process: importing torch is what takes long.
RUN = """
import importlib, json, sys, traceback
from pathlib import Path

sys.modules["t2ilearn"] = None  # an import of it is an error
import torch

errors = {}
for name, lines in json.loads(Path("chapters.json").read_text(encoding="utf-8")).items():
    for module in [m for m in sys.modules if m.split(".")[0] == "here"]:
        del sys.modules[module]
    sys.path[0] = name
    importlib.invalidate_caches()
    try:
        exec(lines, {"torch": torch})
        path = Path(sys.modules["here"].__file__).resolve()
        assert path.is_relative_to(Path(name).resolve()), path
    except Exception:
        errors[name] = traceback.format_exc()
Path("errors.json").write_text(json.dumps(errors), encoding="utf-8")
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, str]:
    """The traceback of every chapter that does not run where its files are copied."""
    folder = tmp_path_factory.mktemp("copied")
    for name in CHAPTERS:
        package = folder / name / "here"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        for sibling in with_siblings(name):
            shutil.copy(MODELS / f"{sibling}.py", package)
    chapters = {name: textwrap.dedent(lines) for name, lines in CHAPTERS.items()}
    (folder / "chapters.json").write_text(json.dumps(chapters), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "errors.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_copied_model_file_runs_with_its_siblings_alone(name, errors):
    assert name not in errors, errors[name]


def test_every_chapter_has_its_files_in_this_test():
    helpers = {"__init__", "layers", "tokens", "distributed", "autoencoder", "quantizers"}
    helpers |= {"conditioning"}
    assert {path.stem for path in MODELS.glob("*.py")} - helpers == CHAPTERS.keys()
    copied = set().union(*(with_siblings(name) for name in CHAPTERS))
    assert helpers - {"__init__"} <= copied
