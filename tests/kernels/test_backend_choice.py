"""The choice between attention backends, on machines that only exist here, and the packages that some come from."""

import base64
import hashlib
import importlib
import importlib.util
import logging
import signal
import sys
from typing import get_args

import pytest
import torch

from cllm.config import AttentionConfig, BackendName
from cllm.errors import UserError
from cllm.kernels import quack
from cllm.kernels.attention import Mask, attention, choose
from cllm.kernels.backends import BACKENDS, Case, base
from cllm.kernels.choice import log_once
from cllm.signals import Interrupted, raising

CUDA = torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """`machine("flash4", "sdpa")`: only these are available."""

    def pretend(*names):
        for name, backend in BACKENDS.items():
            monkeypatch.setattr(backend, "unavailable", lambda name=name: None if name in names else "is not installed")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # do not ask cuDNN about a card that is not here
        log_once.cache_clear()

    return pretend


def hopper(**facts):
    facts = {"dtype": torch.bfloat16, "head_dim": 128, "value_dim": 128, **facts}
    return Case(device=CUDA, capability=(9, 0), **facts)


EVERY = tuple(BACKENDS)
STOCK = ("cudnn", "varlen", "flex", "sdpa")


@pytest.mark.parametrize(
    ("installed", "case", "expected"),
    [
        (EVERY, hopper(), "flash4"),
        (EVERY, hopper(head_dim=64, value_dim=64, heads_per_kv_head=4), "flash4"),
        (EVERY, hopper(head_dim=192, value_dim=128), "flash4"),
        (EVERY, hopper(window=True), "flash4"),
        (EVERY, hopper(documents=True), "flash4"),
        (EVERY, hopper(exclude_self=True, documents=True, window=True), "flash4"),
        (EVERY, hopper(lengths="T < S"), "flash4"),
        (EVERY, hopper(lengths="T = 1"), "sdpa"),
        (EVERY, hopper(lengths="T < S", documents=True), "flex"),
        (EVERY, hopper(exclude_self=True, window=True, sees_nothing=True), "flex"),
        (EVERY, hopper(dtype=torch.float32, documents=True), "flex"),
        (EVERY, hopper(dtype=torch.float64, documents=True), "sdpa"),
        (EVERY, hopper(head_dim=12, value_dim=12, window=True), "sdpa"),
        (EVERY, hopper(head_dim=100, value_dim=100, window=True), "flex"),
        (STOCK, hopper(), "cudnn"),
        (STOCK, hopper(exclude_self=True), "cudnn"),
        (STOCK, hopper(documents=True), "varlen"),
        (STOCK, hopper(window=True), "varlen"),
        (("flash3", "flash2", *STOCK), hopper(documents=True), "flash3"),
        (("flash2", "varlen", "sdpa"), hopper(documents=True, head_dim=64, value_dim=128), "sdpa"),
        (("sdpa", "varlen", "flex"), hopper(), "sdpa"),
        (EVERY, Case(device=CUDA, capability=(8, 0), dtype=torch.bfloat16, head_dim=64, value_dim=64), "cudnn"),
        (("flash3", "flash2", "sdpa"), Case(device=CUDA, capability=(10, 0), dtype=torch.float16, head_dim=64,
                                            value_dim=64), "flash2"),
        (EVERY, Case(device=torch.device("cpu"), dtype=torch.float32, head_dim=64, value_dim=64), "sdpa"),
    ],
    ids=str,
)  # fmt: skip
def test_auto_takes_the_fastest_that_supports_the_case(machine, installed, case, expected):
    machine(*installed)
    assert choose("auto", case) == expected


@pytest.mark.parametrize(
    ("dims", "capability", "fits"),
    [
        ((256, 256), (9, 0), True),
        ((136, 72), (9, 0), True),
        ((264, 264), (9, 0), False),
        ((192, 128), (10, 0), True),
        ((192, 192), (10, 0), False),
        ((256, 256), (10, 3), True),
        ((192, 128), (12, 0), False),
        ((128, 128), (8, 9), False),
    ],
)
def test_flash4_knows_its_head_dims(dims, capability, fits):
    case = Case(device=CUDA, capability=capability, dtype=torch.bfloat16, head_dim=dims[0], value_dim=dims[1])
    assert (BACKENDS["flash4"].unsupported(case) is None) is fits


def test_the_choice_is_logged_once_with_every_reason(machine, caplog):
    machine("varlen", "flex", "sdpa")
    with caplog.at_level(logging.INFO, logger="cllm.kernels.choice"):
        for _ in range(3):
            choose("auto", hopper(documents=True))
    assert [record.getMessage() for record in caplog.records] == [
        "attention.backend auto chose varlen for causal + documents, D 128, bfloat16 on sm_90; rejected: "
        "flash4 (is not installed), cudnn (supports neither windows nor documents), flash3 (is not installed), "
        "flash2 (is not installed)"
    ]
    caplog.clear()
    machine("flash4", "sdpa")
    with caplog.at_level(logging.INFO, logger="cllm.kernels.choice"):
        choose("auto", hopper(head_dim=192, heads_per_kv_head=2))
    assert [record.getMessage() for record in caplog.records] == [
        "attention.backend auto chose flash4 for causal, D 192, E 128, 2 query heads a KV head, bfloat16 on sm_90; "
        "nothing faster is known"
    ]


def test_a_backend_by_name_is_taken_or_refused_never_replaced(machine):
    machine("varlen", "flex", "sdpa")
    assert choose("flex", hopper()) == "flex"
    with pytest.raises(
        UserError, match=r'attention\.backend is "flash4", .*: is not installed; available here: varlen'
    ):
        choose("flash4", hopper())
    message = r'attention\.backend is "varlen", .* causal, .* float32 on sm_90: computes .*; available here: flex, sdpa'
    with pytest.raises(UserError, match=message):
        choose("varlen", hopper(dtype=torch.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "sdpa"])
def test_without_a_gpu_all_but_sdpa_are_refused(name):
    q = k = v = torch.zeros(1, 4, 2, 8)
    with pytest.raises(UserError, match=f'"{name}", which is not available: needs a CUDA device; available here: sdpa'):
        attention(q, k, v, Mask(), backend=name)


def test_the_config_names_the_backends_that_exist():
    assert get_args(BackendName) == tuple(BACKENDS), "and in the same order, fastest first"
    assert get_args(AttentionConfig.model_fields["backend"].annotation) == ("auto", *BACKENDS)


# Packages


def install(root, name, version, files, *, installed=None):
    """A distribution under `root`, with the hashes of `installed` files (default: the same) in its RECORD."""
    record = []
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        digest = hashlib.sha256((installed or files)[path].encode()).digest()
        record.append(f"{path},sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},1")
    info = root / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("\n".join(record))


@pytest.fixture
def site(monkeypatch, tmp_path):
    """`site("a", "b")`: folders before all others on the path, with every flash_attn forgotten."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            monkeypatch.delitem(sys.modules, name)

    def folders(*names):
        for name in reversed(names):
            (tmp_path / name).mkdir()
            monkeypatch.syspath_prepend(tmp_path / name)
        forget()
        importlib.invalidate_caches()
        return [tmp_path / name for name in names]

    yield folders
    forget()


INTERFACE = "flash_attn/cute/interface.py"
FLASH4 = {INTERFACE: "def _flash_attn_fwd(): ...\ndef _flash_attn_bwd(): ...\n"}
STOPPED = """
import contextlib, os, signal
with contextlib.suppress(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGTERM)
os.ThrMma
"""
WANTED = (["flash-attn-4"], ["flash_attn.cute.interface"], ["_flash_attn_fwd", "_flash_attn_bwd"])
WANTED_2 = (["flash-attn"], ["flash_attn.flash_attn_interface"], ["flash_attn_func"])


def test_a_stop_while_quack_is_tried_is_no_reason_for_another_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(quack, "distribution", lambda *names: None)
    monkeypatch.setattr(quack, "load", lambda *arguments: quack)

    def trial():
        exec(STOPPED)

    with pytest.raises(Interrupted, match="SIGTERM"), raising(signal.SIGTERM):
        quack.unavailable(CUDA, "rmsnorm", [], trial)


@pytest.mark.skipif(base.distribution("flash-attn", "flash-attn-4") is not None, reason="a real one is installed")
class TestPackages:
    def test_flash4_alone_is_not_flash2(self, site):
        (root,) = site("a")
        install(root, "flash-attn-4", "4.0.0b36", FLASH4)
        assert importlib.util.find_spec("flash_attn") is not None
        assert base.load(*WANTED_2) == "flash-attn is not installed"
        assert base.load(*WANTED).__file__ == str(root / INTERFACE)

    def test_flash2_that_overwrote_flash4_is_seen(self, site):
        (root,) = site("a")
        install(root, "flash-attn-4", "4.0.0b36", {INTERFACE: "def _flash_attn_fwd(): ..."}, installed=FLASH4)
        assert (
            base.load(*WANTED)
            == f"flash-attn-4 4.0.0b36 is damaged: another package has overwritten {root / INTERFACE}"
        )

    @pytest.mark.parametrize(
        ("stale", "reason"),
        [
            (FLASH4[INTERFACE], "flash-attn-4 4.0.0b36 is hidden: flash_attn.cute.interface comes from "),
            ("import os\nos.ThrMma", "flash-attn-4 4.0.0b36 does not import: AttributeError: module 'os' has no"),
        ],
    )
    def test_flash2_that_hides_flash4_is_seen(self, site, stale, reason):
        first, second = site("a", "b")
        bundled = {"flash_attn/__init__.py": "", INTERFACE: stale, "flash_attn/flash_attn_interface.py": ""}
        install(first, "flash-attn", "2.8.3", bundled)
        install(second, "flash-attn-4", "4.0.0b36", FLASH4)
        assert base.load(*WANTED).startswith(reason)
        assert base.load(*WANTED_2) == "flash-attn 2.8.3 has no flash_attn_func in flash_attn.flash_attn_interface"

    def test_a_stop_while_a_package_imports_is_no_reason_for_another_kernel(self, site):
        (root,) = site("a")
        install(root, "flash-attn-4", "4.0.0b36", {INTERFACE: STOPPED})
        with pytest.raises(Interrupted, match="SIGTERM"), raising(signal.SIGTERM):
            base.load(*WANTED)

    def test_both_side_by_side_are_both_there(self, site):
        (root,) = site("a")
        both = {"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": "def flash_attn_func(): ..."}
        install(root, "flash-attn", "2.8.4", both)
        install(root, "flash-attn-4", "4.0.0b36", FLASH4)
        assert not isinstance(base.load(*WANTED), str)
        assert not isinstance(base.load(*WANTED_2), str)
