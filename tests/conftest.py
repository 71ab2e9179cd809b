"""What every test shares: shapes checked at run time, two cores kept apart, no network.

Order matters: the import hook must be in place before anything imports t2ilearn, and the thread
counts before anything imports torch.
"""

import os
import socket
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist puts one worker on each core
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TQDM_DISABLE"] = "1"  # as when the chapters were stored
os.environ["HF_HUB_OFFLINE"] = "1"  # peers are built from configs, never fetched

import jaxtyping

jaxtyping.install_import_hook("t2ilearn", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "", None}


class NetworkBlocked(OSError):
    """A test reached for another machine; everything in this repository works offline."""


def _refuse_other_hosts(address: object) -> None:
    """Raise NetworkBlocked for an address (host, port, ...) beyond this machine."""
    if isinstance(address, tuple) and address[0] not in LOOPBACK:
        raise NetworkBlocked(f"tests run offline, but something connects to {address!r}")


@pytest.fixture(autouse=True, scope="session")
def offline():
    """Connections to other hosts, and look-ups of their names, raise NetworkBlocked."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
    lookup = socket.getaddrinfo

    def guarded_connect(self, address):
        _refuse_other_hosts(address)
        return connect(self, address)

    def guarded_connect_ex(self, address):
        _refuse_other_hosts(address)
        return connect_ex(self, address)

    def guarded_lookup(host, *args, **kwargs):
        _refuse_other_hosts((host.decode() if isinstance(host, bytes) else host,))
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield


def pytest_collection_modifyitems(items):
    """Skip what wants a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The CPU, and a CUDA device where one is at hand: the same test on both."""
    return torch.device(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """No shape checks at run time: what a reader meets is the package's own message."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT
