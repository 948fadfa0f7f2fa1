"""Kernels that come up before the last one has ended: what they may do until then, and that it changes nothing."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from gfxlm.device.arch import ARCHITECTURES, architecture, assume
from gfxlm.kernels.basic.norm import rms_norm
from gfxlm.kernels.basic.select import select
from gfxlm.kernels.launch import recording
from gfxlm.kernels.linear.matvec import matvec
from gfxlm.kernels.linear.rows import rows
from gfxlm.kernels.linear.skinny import skinny
from gfxlm.kernels.linear.wide import wide
from gfxlm.kernels.moe.decode import Shared, expert_mlp_decode
from gfxlm.kernels.moe.router import route
from gfxlm.kernels.packed import Packed
from tests.kernels.compiled import run_python

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16


def test_launches_say_so_where_the_architecture_can() -> None:
    x = torch.empty(2, 256, dtype=HALF, device="meta")
    for name, arch in ARCHITECTURES.items():
        with recording(arch) as launches:
            rms_norm(x, None, 1e-6, HALF)
        assert launches[0].constants["early"] is arch.early
        assert launches[0].options.get("launch_pdl", False) is arch.early
        assert arch.early == (name in ("sm_90", "sm_100", "sm_120"))


COMPILED = """
import json, re
from gfxlm.device.arch import named
from gfxlm.kernels.cases import catalogue
from gfxlm.kernels.record import record

arch, seen = named("sm_90"), {}
for cases in catalogue().values():
    for case in cases:
        for launch in record(case, arch):
            told = launch.options.get("launch_pdl", False)
            if launch.kernel.__name__ in seen:
                continue
            text = launch.compile(arch).asm["ptx"] if told else "griddepcontrol.wait"
            lines = [line.strip() for line in text.splitlines()]
            wait = [i for i, line in enumerate(lines) if line.startswith("griddepcontrol.wait")]
            until = [re.sub("^@!?%p[0-9]+ ", "", line) for line in lines[: wait[0]]]
            starts = ("ld.global", "st.", "atom", "red.", "ret", "call")
            early = [line for line in until if line.startswith(starts)]
            # Nor is it gone round.
            early += [line for line in until if line.startswith("bra") and line.split()[-1][:-1] + ":" not in until]
            seen[launch.kernel.__name__] = told, "early" in launch.kernel.arg_names, early
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_nothing_is_read_or_written_before_the_wait() -> None:
    """What is compiled for sm_90 of the first case of every kernel: what comes before the wait ends in it."""
    seen = run_python(COMPILED)
    assert {
        "matvec_kernel",
        "skinny_kernel",
        "wide_kernel",
        "add_parts_kernel",
        "rms_norm_kernel",
        "down_kernel",
        "decode_kernel",
    } <= seen.keys()
    for name, (told, declared, early) in seen.items():
        assert told == declared, name
        assert not early, name


@contextmanager
def _late() -> Iterator[None]:
    with assume(dataclasses.replace(architecture(DEVICE), early=False)):
        yield


def _packed(*shape: int) -> Packed:
    *outer, columns = shape
    words = torch.randint(-(2**31), 2**31 - 1, (*outer, columns // 8), dtype=torch.int32, device=DEVICE)
    pairs = torch.randn(*outer, columns // 64, 2, device=DEVICE) / columns**0.5
    scales, biases = (pairs / torch.tensor([5.0, 1.0], device=DEVICE)).to(HALF).unbind(-1)
    return Packed(words, scales, biases, 64, 4, "affine")


class _Model:
    """Layers of a mixture of experts and of a plain MLP, from a token to the next one."""

    def __init__(self, hidden: int, inner: int, experts: int, layers: int) -> None:
        self.embedding, self.norm = _packed(1024, hidden), torch.randn(hidden, device=DEVICE).to(HALF)
        self.layers = [
            (
                _packed(2 * inner, hidden), _packed(hidden, inner), _packed(experts + 1, hidden),
                _packed(experts, 2 * inner, hidden), _packed(experts, hidden, inner),
                _packed(2 * inner, hidden), _packed(hidden, inner),
            )
            for _ in range(layers)
        ]  # fmt: skip

    def __call__(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The next state (1, hidden) and the logits of its token."""
        x = state
        for gate_up, down, router, stack, stack_down, shared, shared_down in self.layers:
            y, _ = rms_norm(x, self.norm, 1e-6, HALF)
            x = wide(skinny(y, gate_up, swiglu=True), down, residual=x)
            y, total = rms_norm(y, self.norm, 1e-6, HALF, residual=x)
            logits = wide(y, router)  # on sm_90 K is shared, and parts are added
            experts, scores = route(logits[:, :-1], 4, True)
            rider = Shared(shared, shared_down, logits[:, -1:])
            x = expert_mlp_decode(y, experts, scores, stack, stack_down, shared=rider, residual=total)
        x, _ = rms_norm(x, None, 1e-6, HALF)
        logits = matvec(x, self.embedding)
        _, following = rms_norm(rows(select(logits), self.embedding, HALF), None, 1e-6, HALF, residual=x)
        assert following is not None
        return following, logits


def _generate(model: _Model, first: Tensor, steps: int) -> Tensor:
    """The logits (steps, vocabulary) of one captured step that is replayed."""
    state = first.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        following, logits = model(state)
        state.copy_(following)
    found = []
    for _ in range(steps):
        graph.replay()
        found.append(logits.clone())
    torch.cuda.synchronize()
    return torch.cat(found)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_chains_give_the_same_bits() -> None:
    """Hundreds of replays, in which memory is used again and again: every logit is that of kernels started in turn."""
    if not architecture(DEVICE).early:
        pytest.skip("needs an architecture that starts kernels early")
    torch.manual_seed(0)
    model, first = _Model(1024, 512, 16, 6), torch.randn(1, 1024, device=DEVICE).to(HALF)
    with torch.inference_mode():
        with _late():
            logits = _generate(model, first, 300)
        assert logits.isfinite().all()
        assert len(logits.argmax(1).unique()) > 10
        for _ in range(3):
            assert torch.equal(_generate(model, first, 300), logits)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_what_torch_wrote_just_before_is_seen() -> None:
    """Inputs and weights alike: what comes up early reads neither before its time."""
    x, weight = torch.zeros(1, 4096, dtype=HALF, device=DEVICE), torch.zeros(4096, dtype=HALF, device=DEVICE)
    packed = _packed(512, 4096)
    words = [packed.words.clone(), packed.words.flip(0)]
    found = []
    for i in range(200):
        x.fill_(i % 7 + 1)
        weight.fill_(i % 5 + 1)
        y, _ = rms_norm(x, weight, 0.0, HALF)
        packed.words.copy_(words[i % 2])
        found.append((y, matvec(y, packed)))
    for i, (y, z) in enumerate(found):
        assert (y == i % 5 + 1).all()
        assert torch.equal(z, found[i % 10][1])
    assert not torch.equal(found[0][1], found[5][1])
