"""Blocks that are streamed through a device: in the right order, in few cells, with the results of resident blocks."""

import pytest
import torch
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from turbo_nb.layerwise import StoredEmbedding
from turbo_nb.runtime import block_stream, expert_swap, packed
from turbo_nb.runtime.block_stream import BlockStream, StreamedEncoder
from turbo_nb.runtime.packed import pack, tensors_of, unpacked

X = torch.linspace(-1, 1, 16)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Block(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.register_buffer("int8", torch.randint(-9, 9, (3, 5), dtype=torch.int8))
        self.requires_grad_(False)

    def forward(self, x):
        return torch.tanh(self.second(self.first(x))) + self.int8.float().mean()


class Transformer(nn.Module):
    def __init__(self, count: int, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Linear(16, 16).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(100 * seed + index) for index in range(count))

    def forward(self, x):
        x = self.patch(x)
        for block in self.blocks:
            x = block(x)
        return x


def streamed(model: Transformer, keep: int, packs=lambda groups: pack(groups, False), **more) -> BlockStream:
    return BlockStream(model.blocks, packs([tensors_of(block) for block in model.blocks]), keep, "cpu", **more)


def at(module: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors_of(module)]


def away(model: Transformer, homes: list[list[int]]) -> set[int]:
    """Blocks whose weights are on the device"""
    return {index for index, block in enumerate(model.blocks) if at(block) != homes[index]}


@pytest.fixture
def small(monkeypatch):
    """Pieces that end within a block"""
    monkeypatch.setattr(packed, "PIECE", 3000)


@pytest.fixture
def fetched(monkeypatch):
    """Blocks in the order of their copies"""
    told, fetch = [], BlockStream._fetch
    monkeypatch.setattr(BlockStream, "_fetch", lambda self, index: told.append(index) or fetch(self, index))
    return told


@pytest.mark.parametrize("packs", [lambda groups: pack(groups, False), unpacked], ids=["packed", "unpacked"])
@pytest.mark.parametrize("keep", [0, 1, 3, 6, 7, 9])
@pytest.mark.parametrize("inference", [False, True])
def test_streamed_blocks_give_the_bits_of_resident_ones(small, keep, packs, inference):
    model, plain = Transformer(7), Transformer(7)
    with torch.inference_mode(inference):
        stream = streamed(model, keep, packs)
        homes = [at(block) for block in model.blocks]
        for _ in range(3):
            assert torch.equal(model(X), plain(X)) and away(model, homes) == set(stream._home)
        assert stream._memory.nbytes == min(7, keep + 2) * stream._size if keep != 6 else 7 * stream._size
        stream.release()
        assert stream._memory is None and stream.loaded == [] and away(model, homes) == set()
        assert torch.equal(model(X), plain(X))  # begins again
        stream.remove()
        assert away(model, homes) == set() and torch.equal(model(X), plain(X)) and stream.loaded == []
    for (name, tensor), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(tensor, theirs), name


def test_each_block_is_copied_before_its_turn_and_those_that_stay_once(fetched):
    model = Transformer(6)
    stream = streamed(model, 3)
    stays = set(stream._home)
    assert len(stays) == 3 and sorted({*range(6)} - stays) == [0, 2, 4]  # spread evenly
    model(X)
    assert fetched[:6] == [0, 1, 2, 3, 4, 5]
    del fetched[:]
    for _ in range(2):
        model(X)
    assert {*fetched} == {0, 2, 4} and len(fetched) in (6, 7)
    stream.release()


def test_the_next_block_is_on_its_way_when_one_has_worked(fetched):
    for again, last in ((True, 0), (False, 3)):  # the first one of the next step, or no other
        model, ahead = Transformer(4), []
        stream = streamed(model, 0, again=again)
        for block in model.blocks:
            block.register_forward_hook(lambda *_, ahead=ahead: ahead.append(fetched[-1]))
        for _ in range(2):
            model(X)
        assert ahead == [1, 2, 3, last] * 2
        stream.remove()


def fail(*_):
    raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize("failing", [2, 3], ids=["streamed", "stays"])
def test_a_block_that_failed_works_again(failing, monkeypatch):
    model, plain = Transformer(4), Transformer(4)
    stream, homes = streamed(model, 1), [at(block) for block in model.blocks]
    assert set(stream._home) == {3}
    model.blocks[failing].second.forward = fail
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            model(X)
    del model.blocks[failing].second.forward
    assert torch.equal(model(X), plain(X)) and away(model, homes) == {3}
    model.blocks[failing].second.forward = fail
    with pytest.raises(torch.OutOfMemoryError):
        model(X)
    stream.release()
    assert away(model, homes) == set()
    del model.blocks[failing].second.forward
    model.blocks[failing].added = nn.Parameter(torch.ones(3), requires_grad=False)  # is copied by itself
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", fail)
        with pytest.raises(torch.OutOfMemoryError):
            model(X)
    assert torch.equal(model(X), plain(X))
    del model.blocks[failing].added
    stream.release()
    assert away(model, homes) == set()


def test_blocks_can_be_called_in_any_order():
    model, plain = Transformer(5), Transformer(5)
    streamed(model, 1)
    for index in (4, 0, 3, 3, 1, 4, 2, 0):
        assert torch.equal(model.blocks[index](X), plain.blocks[index](X))


def test_weights_of_a_block_that_are_changed_replaced_or_added_are_used():
    model, plain = Transformer(3), Transformer(3)
    stream = streamed(model, 1)
    model(X)
    stream.release()  # as after each clip
    for one in (model, plain):
        one.blocks[0].first.weight.data += 1  # in place, as a LoRA is merged
        one.blocks[1].second.weight = nn.Parameter(torch.eye(16), requires_grad=False)
        one.blocks[2].second.weight.data = one.blocks[2].second.weight.data * 2
    for _ in range(2):
        assert torch.equal(model(X), plain(X))


class Pipeline:
    def __init__(self, *modules):
        self.modules = modules

    def maybe_free_model_hooks(self):
        pass

    def remove_all_hooks(self):
        from accelerate.hooks import remove_hook_from_module

        for module in self.modules:
            remove_hook_from_module(module)


def test_two_experts_stream_in_turns_and_leave_the_device_to_the_vae():
    experts, vae = [Transformer(5, seed) for seed in (1, 2)], Block(9)
    expected = [Transformer(5, seed)(X) for seed in (1, 2)]
    pipeline = Pipeline(*experts, vae)
    expert_swap.enable(pipeline, pipeline.modules, "cpu", keep=2)
    streams = [expert._hf_hook._block_stream for expert in experts]
    homes = [at(module) for module in pipeline.modules]
    for turn in (0, 0, 1, 1, 0):
        assert torch.equal(experts[turn](X), expected[turn])
        assert [stream._memory is not None for stream in streams] == [turn == 0, turn == 1]
        assert len(streams[turn].loaded) in (3, 4) and streams[1 - turn].loaded == []
    assert torch.equal(vae(X), Block(9)(X)) and [stream._memory for stream in streams] == [None, None]
    experts[0](X)
    pipeline.maybe_free_model_hooks()
    assert [at(module) for module in pipeline.modules] == homes and streams[0]._memory is None
    expert_swap.disable(pipeline)
    assert torch.equal(experts[1](X), expected[1]) and not any(block._forward_hooks for block in experts[1].blocks)
    expert_swap.enable(pipeline, pipeline.modules, "cpu", keep=4)  # another plan
    assert torch.equal(experts[1](X), expected[1])


def encoder(stored: bool = False) -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, feed_forward_proj="gated-gelu"
    )
    made = UMT5EncoderModel(config).to(torch.bfloat16).requires_grad_(False).eval()
    if stored:
        table = made.shared.weight.to(torch.float8_e4m3fn)
        made.shared = made.encoder.embed_tokens = StoredEmbedding(table, torch.tensor(0.3), torch.bfloat16)
    return made


def encode(made: UMT5EncoderModel, device: str) -> torch.Tensor:
    ids, mask = torch.arange(24)[None] % 50, (torch.arange(24) < 17).long()[None]
    with torch.inference_mode():
        return made(ids.to(device), mask.to(device)).last_hidden_state.cpu()


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("pin", [False, True])
def test_a_streamed_text_encoder_gives_the_bits_of_a_resident_one(device, pin, stored):
    expected = encode(encoder(stored).to(device), device)
    whole = StreamedEncoder(encoder(stored), device, pin)
    for _ in range(2):
        for inputs in ("cpu", device):  # diffusers puts the ids where the first parameter is
            assert torch.equal(encode(whole.module, inputs), expected)
        whole.release()
        blocks = whole.module.encoder.block
        assert all(tensor.device.type == "cpu" for tensor in tensors_of(blocks))


def test_a_text_encoder_is_pinned_only_where_main_memory_has_room(monkeypatch):
    asked = []
    monkeypatch.setattr(block_stream, "pack", lambda groups, pin: asked.append(pin) or pack(groups, False))
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)  # because torch has no "cuda" here
    for free, pin, device in ((1e9, True, "cuda"), (100, True, "cuda"), (1e9, False, "cuda"), (1e9, True, "cpu")):
        monkeypatch.setattr(block_stream.probe, "free_memory", lambda device, free=free: free)
        StreamedEncoder(encoder(), device, pin)
    assert asked == [True]


@pytest.fixture
def cuda(monkeypatch):
    """Streams and events that record what waits for what, because torch has no GPU here"""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            told.append(f"{self.name} waits for {event}")

        def record_event(self):
            told.append(f"{self.name} #{len(told)}")
            return told[-1]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs | {"device": "cpu"}))
    return told


def test_a_block_waits_for_its_copy_and_a_copy_for_the_block_before_it_in_its_cell(cuda):
    model, plain = Transformer(3), Transformer(3)
    stream = streamed(model, 0)
    stream._device = torch.device("cuda")
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: cuda.append("work"))
    model(X)
    assert cuda == [
        "side waits for main",  # for the new memory
        "side #1", "main waits for side #1", "work", "main #4",  # block 0 in the first cell
        "side #5", "main waits for side #5", "work", "main #8",  # block 1 in the second one
        "side waits for main #4", "side #10", "main waits for side #10", "work", "main #13",  # block 2, when 0 is done
        "side waits for main #8", "side #15",  # block 0 again
    ]  # fmt: skip
    stream.release()
    assert cuda[-1] == "main waits for side" and torch.equal(model(X), plain(X))


@GPU
@pytest.mark.parametrize("keep", [0, 3, 8])
@pytest.mark.parametrize("pin", [False, True])
def test_blocks_on_a_gpu_give_the_bits_of_resident_ones(keep, pin):
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8))).requires_grad_(False)
    x = torch.randn(4096, 2048, device="cuda")
    expected = model.cuda()(x)
    model.cpu()
    stream = BlockStream(model, pack([tensors_of(layer) for layer in model], pin), keep, "cuda")
    torch.cuda.synchronize()
    with torch.inference_mode():
        for turn in range(6):
            assert torch.equal(model(x), expected), turn
            stream.release() if turn % 2 else None
            torch.full((2048, 2048), torch.nan, device="cuda")  # in the memory that was given back
    assert all(layer.weight.device.type == "cpu" for layer in model)
