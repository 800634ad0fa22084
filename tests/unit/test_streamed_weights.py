"""Weights read in pieces: the bits of whole tensors, wherever chunks begin; and averages of such weights."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from btm_cluster.errors import IntegrityError
from btm_cluster.language_model.averaging import average_models
from btm_cluster.language_model.stored_weights import TensorFiles, parts_of
from btm_cluster.language_model.streamed_weights import StreamedWeights
from btm_cluster.language_model.tensor_files import names_in_order
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.ledger.artifact import CHUNK_BYTES
from btm_cluster.storage.local_folder import LocalFolder
from tests.made import origin

SHAPES = {"embedding": (3000, 700), "none": (0, 3), "norm": (7,), "scalar": (), "head": (700, 3001)}
"""About 17 MB in float32: three chunks, whose borders lie within tensors."""


class Cut:
    """A file's bytes in pieces of some length, the first to a border of it."""

    def __init__(self, file: Path, length: int) -> None:
        self._data, self._length = bytearray(file.read_bytes()), length

    def pieces(self, start: int, size: int, alone: bool = False) -> Iterator[memoryview]:  # noqa: ARG002
        stop = start + size
        while start < stop:
            until = min(stop, (start // self._length + 1) * self._length)
            yield memoryview(self._data)[start:until]
            start = until

    def drop(self) -> None:
        """It holds the whole file."""


def tensors(random_seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(random_seed)
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return found | {"places": torch.arange(5)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, list[Artifact], list[Path]]:
    """Two models in a store, and their files."""
    folder = tmp_path_factory.mktemp("streamed")
    ledger, artifacts, files = Ledger.open(str(folder / "store")), [], []
    for number in range(2):
        file = folder / f"{number}.safetensors"
        save_file(tensors(number), file)
        artifacts.append(ledger.commit(origin("model", {"n": number}), {"model.safetensors": file}, {}))
        files.append(file)
    return ledger, artifacts, files


class Bucket(LocalFolder):
    """A folder of whose objects a node would keep copies: it is read in ranges instead."""

    copies_bytes = 1

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.starts: list[int] = []
        """Of reads, in chunks."""

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        if key.startswith("blobs/"):
            self.starts.append(start // CHUNK_BYTES)
        return super().read(key, start, size)

    def download(self, key: str, anew: bool = False) -> Path:  # noqa: ARG002
        raise AssertionError(f"{key} was copied")


@pytest.mark.parametrize("kind", [LocalFolder, Bucket])
def test_streamed_weights_are_those_of_the_file(
    stored: tuple[Ledger, list[Artifact], list[Path]], kind: type[LocalFolder]
) -> None:
    _, artifacts, files = stored
    ledger = Ledger(kind(stored[0].storage.location))
    with ThreadPoolExecutor(2) as pool:
        streamed = StreamedWeights([ledger.stream(artifacts[0], "model.safetensors", pool)], "a model")
        whole = TensorFiles([files[0]])
        assert streamed.header == whole.header
        for name in tensors(0):
            assert torch.equal(streamed.read(name), whole.read(name)), name
        assert torch.equal(
            torch.cat(list(streamed.pieces("head", 12_345, 1_500_000))),
            whole.read("head").reshape(-1)[12_345:1_512_345],
        )


class AtOnce(Executor):
    """Does what is submitted before it returns."""

    def submit(self, act: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(act(*args, **named))
        return done


@pytest.mark.parametrize(("ahead", "first"), [(True, [0, 1]), (False, [0])])
def test_a_stream_holds_the_chunk_in_use_and_one_more_where_asked(
    stored: tuple[Ledger, list[Artifact], list[Path]], ahead: bool, first: list[int]
) -> None:
    """Two chunks of every file were held from its header on: 4 GB for eight models of 30 files."""
    bucket = Bucket(stored[0].storage.location)
    source = Ledger(bucket).stream(stored[1][0], "model.safetensors", AtOnce(), ahead)
    streamed = StreamedWeights([source], "a model")
    assert bucket.starts == [0], "nothing is read ahead of the header"
    streamed.read("places")
    assert bucket.starts == [0, *first], "the header's chunk was kept"
    for name in names_in_order(streamed.header):
        streamed.read(name)
    assert bucket.starts == [0, 0, 1, 2], "a chunk was read twice"
    streamed.read("scalar")
    assert bucket.starts == [0, 0, 1, 2, 2], "the last chunk was kept"


def test_an_average_of_streams_is_that_of_files_bit_by_bit(
    stored: tuple[Ledger, list[Artifact], list[Path]],
) -> None:
    ledger, artifacts, files = stored
    plain = [TensorFiles([file]) for file in files]
    with ThreadPoolExecutor(2) as pool:
        streams = [
            StreamedWeights([ledger.stream(one, "model.safetensors", pool)], "a model") for one in artifacts
        ]
        average = average_models(streams, [0.3, 0.7])
        found: dict[str, list[torch.Tensor]] = {}
        for name, first, part in parts_of(average):
            assert first == sum(map(len, found.get(name, ())))
            found.setdefault(name, []).append(part)
    for name in SHAPES:
        one, other = (model.read(name) for model in plain)
        expected = torch.zeros(one.shape).add_(one, alpha=0.3).add_(other, alpha=0.7)
        parts = torch.cat(found[name]) if name in found else torch.empty(0)
        assert torch.equal(parts.reshape(expected.shape), expected), name
        assert torch.equal(average_models(plain, [0.3, 0.7]).read(name), expected), name
    assert torch.equal(found["places"][0], torch.arange(5))


def test_a_damaged_chunk_is_named_before_anything_is_made_of_it(
    stored: tuple[Ledger, list[Artifact], list[Path]], tmp_path: Path
) -> None:
    _, _, files = stored
    ledger = Ledger.open(str(tmp_path / "store"))
    made = ledger.commit(origin("model", {}), {"model.safetensors": files[0]}, {})
    blob = tmp_path / "store/blobs" / made.blob("model.safetensors").sha256
    with blob.open("rb+") as file:
        file.seek(9_000_000)
        file.write(b"\0\0")
    with ThreadPoolExecutor(2) as pool, pytest.raises(IntegrityError, match=r"model\.safetensors"):
        StreamedWeights([ledger.stream(made, "model.safetensors", pool)], "a model").read("head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_elements_on_both_sides_of_a_border_are_put_together(tmp_path: Path, dtype: torch.dtype) -> None:
    """An older safetensors does not align what follows its header."""
    file = tmp_path / "model.safetensors"
    values = tensors(3, dtype)["norm"]
    header = b'{"norm":{"dtype":"%s","shape":[7],"data_offsets":[0,%d]}} '
    name, size = (b"BF16", 14) if dtype == torch.bfloat16 else (b"F32", 28)
    encoded = header % (name, size)
    encoded += b" " * (1 - len(encoded) % 2)  # an odd length
    file.write_bytes(
        len(encoded).to_bytes(8, "little") + encoded + values.view(torch.uint8).numpy().tobytes()
    )
    streamed = StreamedWeights([Cut(file, 8)], "a model")
    assert torch.equal(torch.cat(list(streamed.pieces("norm", 1, 5))), values[1:6])
    assert torch.equal(streamed.read("norm"), values)
