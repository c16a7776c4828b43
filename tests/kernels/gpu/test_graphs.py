"""When CUDA graphs are recorded, replayed and dropped."""

import contextlib
import warnings

import pytest
import torch
from gpu_cases import CUDA, DEVICE, MARKS, NAMES, loss, model, needs_cuda
from helpers import difference, images
from torch import Tensor

import vit
from vit.kernels.gpu import graphs, tuning
from vit.kernels.gpu.model import CUDAViT

pytestmark = MARKS


def test_when_graphs_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the third call of a shape; the least recently used is dropped; a failure is warned of once. On any machine."""
    recorded, replayed, eager = [], [], []
    made = graphs.Graphs()
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(made, "wait", lambda: None)
    monkeypatch.setattr(graphs, "SHAPES", 2)
    monkeypatch.setattr(made, "record", lambda fn, x, besides: recorded.append(len(x)))
    monkeypatch.setattr(made, "replay", lambda key, x: replayed.append(key[0]))

    def call(*sizes: int) -> None:
        for n in sizes:
            made(lambda x: eager.append(len(x)), torch.empty(n, 3), None, list)

    call(1, 1, 1, 2, 2, 2, 1)
    assert (recorded, replayed, eager) == ([1, 2], [1, 2, 1], [1, 1, 2, 2])
    call(3, 3, 3, 1)  # 2 was the least recently used when 3 needed a place
    assert recorded == [1, 2, 3] and replayed[3:] == [3, 1]
    call(*[2] * 6)  # and now waits twice as long
    assert recorded == [1, 2, 3, 2] and replayed[5:] == [2] and eager[4:] == [3, 3, *[2] * 5]
    many = graphs.SHAPES + 1
    call(*list(range(11, 11 + many)) * 40)
    assert len(recorded) < 5 * many + 4  # more shapes in turn than places: hardly any is recorded
    made.forget()
    eager.clear()
    call(1)
    assert eager == [1]

    def broken(fn: object, x: Tensor, besides: object) -> None:
        try:
            raise failure
        finally:
            raise RuntimeError("failed due to a previous error")  # as torch.cuda.graph raises after any error

    monkeypatch.setattr(made, "record", broken)
    failure = torch.OutOfMemoryError("CUDA out of memory")
    for calls in (2, 6, 12):  # tried again, after twice as many calls
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(*[1] * (calls - 1))
        with pytest.warns(UserWarning, match="launched one by one.* because: CUDA out of memory"):
            call(1)
    failure = RuntimeError("operation not permitted when stream is capturing")
    call(7, 7)
    with pytest.warns(UserWarning, match="launched one by one.* because: operation not permitted"):
        call(7)
    eager.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(*[1] * 50, *[8] * 50)
    assert eager == [1] * 50 + [8] * 50


class Wrapped(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor | None) -> Tensor:
        return self.inner(*args)


@torch.inference_mode()
def test_graphs_of_parts_that_were_replaced_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head, a block or a weight: a graph would use the old one. On any machine, with a tensor for a graph."""
    if not CUDA:
        monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
        monkeypatch.setattr(CUDAViT, "_is_recordable", lambda self, x: True)
        monkeypatch.setattr(graphs.Graphs, "record", lambda self, fn, x, besides: fn(x))
        monkeypatch.setattr(graphs.Graphs, "wait", lambda self: None)
        monkeypatch.setattr(graphs.Graphs, "replay", lambda self, key, x: self.kept[key].clone())
    fast = vit.kernels.optimize(model(), NAMES[0])
    x = images(2, 3, 64, 64).to(DEVICE)

    def called() -> Tensor:
        for _ in range(4):  # the last two by a graph
            found = fast(x)
        assert len(fast._graphs.kept) == 1
        return found

    assert called().shape == (2, 10)
    fast.head = torch.nn.Identity()
    before = called()
    assert before.shape == (2, 96)
    fast.blocks = fast.blocks[:1]
    assert difference(called(), fast.forward_head(fast.forward_features(x))) <= loss(NAMES[0])
    assert difference(called(), before) > 10 * loss(NAMES[0])
    fast.norm.weight = torch.nn.Parameter(torch.zeros_like(fast.norm.weight), requires_grad=False)
    assert torch.equal(called(), fast.norm.bias.expand(2, 96))
    seen = []
    fast.blocks[0].mlp = Wrapped(fast.blocks[0].mlp)
    fast.blocks[0].mlp.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    fast(x)
    assert seen == [(2, 17, 96)]  # of all tokens, since there is a hook


@needs_cuda
@torch.inference_mode()
def test_graphs() -> None:
    """One for each shape, all in the same memory; what they read outlives its place in the cache."""
    slow = model()
    fast = vit.kernels.optimize(slow, NAMES[0])
    reserved = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is launched one by one
        for size in [(64, 64), (32, 80), *[(16 * i, 32) for i in range(1, 20)], (64, 64)]:
            for seed in (1, 2, 3, 4):  # the last two by a graph
                x = images(2, 3, *size, seed=seed).to(DEVICE)
                assert difference(fast(x), slow(x)) <= loss(NAMES[0])
            reserved.append(torch.cuda.memory_reserved())
        assert len(fast._graphs.kept) == 16
        assert reserved[16] <= reserved[1] + 64 * 2**20
        for one in (slow, fast):
            one.set_attention("sdpa")
        assert not fast._graphs.kept
        for seed in (1, 2, 3, 4):
            x = images(2, 3, 64, 64, seed=seed).to(DEVICE)
            assert difference(fast(x), slow(x)) <= loss(NAMES[0])


@needs_cuda
@torch.inference_mode()
def test_graphs_of_two_models_on_two_streams() -> None:
    pairs = [(slow := model(num_classes=classes), vit.kernels.optimize(slow, NAMES[0])) for classes in (10, 8)]
    given = [images(8, 3, 64, 64, seed=seed).to(DEVICE) for seed in range(20)]
    expected = [[slow(x) for x in given] for slow, _ in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for x in given:
        for i, (_, fast) in enumerate(pairs):
            with torch.cuda.stream(streams[i]):
                found[i].append(fast(x))
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert difference(a, b) <= loss(NAMES[0])


@needs_cuda
@torch.inference_mode()
def test_a_graph_keeps_its_memory() -> None:
    """Whatever is recorded, dropped and freed after it: a graph has a cuBLAS workspace of its own."""
    slow = model()
    fast = vit.kernels.optimize(slow, NAMES[0])
    x = images(1, 3, 224, 224).to(DEVICE)
    for _ in range(4):
        fast(x)
    assert len(fast._graphs.kept) == 1
    device = torch.device("cuda", torch.cuda.current_device())
    for n in (64, 1024):  # recorded and dropped, as the tuner does it
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        tuning.milliseconds(lambda a=a: a @ a, device)
    torch.cuda.empty_cache()
    torch.full((2**28,), torch.nan, device=device)
    for seed in (1, 2, 3):
        x = images(1, 3, 224, 224, seed=seed).to(DEVICE)
        assert difference(fast(x), slow(x)) <= loss(NAMES[0])


class Asking(torch.nn.Module):
    """A head that reads a number back from the GPU, which cannot be recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


@needs_cuda
@torch.inference_mode()
def test_what_cannot_be_recorded_leaves_nothing_behind() -> None:
    fast = vit.kernels.optimize(model(), NAMES[0])
    head, fast.head = fast.head, Asking()
    x, stream = images(1, 3, 64, 64).to(DEVICE), torch.cuda.current_stream()
    fast(x), fast(x)
    with pytest.warns(UserWarning, match="launched one by one"):
        fast(x)
    assert torch.cuda.current_stream() == stream and torch.rand(3, device=DEVICE).isfinite().all()
    fast.head = head
    for _ in range(4):
        fast(x)
    assert len(fast._graphs.kept) == 1


@needs_cuda
@torch.inference_mode()
def test_recorded_by_others() -> None:
    """While the caller records a graph, ours are neither recorded nor replayed."""
    for warm_ups in (2, 4):
        slow = model()
        fast = vit.kernels.optimize(slow, NAMES[0])
        given = images(1, 3, 64, 64).to(DEVICE)
        for _ in range(warm_ups):
            fast(given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = fast(given)
        given.copy_(images(1, 3, 64, 64, seed=9))
        graph.replay()
        assert difference(found, slow(given)) <= loss(NAMES[0])


def test_what_ended_a_recording():
    """The error behind PyTorch's, but not one that the caller was already handling."""
    memory, invalid, others = torch.OutOfMemoryError("out of memory"), RuntimeError("invalid"), ValueError("others'")
    for raised, context, handled, lacks, text in [
        (memory, None, None, True, "out of memory"),
        (memory, others, others, True, "out of memory"),
        (invalid, memory, None, True, "out of memory"),
        (invalid, memory, memory, False, "invalid"),
        (memory, invalid, None, True, "out of memory"),
    ]:
        raised.__context__ = context
        assert graphs.cause(raised, handled) == (lacks, text)
        raised.__context__ = None
