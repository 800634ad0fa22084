"""Weights read in pieces: the bits of whole tensors, wherever chunks begin; and averages of such weights."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from btm_cluster.errors import IntegrityError
from btm_cluster.language_model.averaging import average_models
from btm_cluster.language_model.stored_weights import TensorFiles, parts_of
from btm_cluster.language_model.streamed_weights import StreamedWeights
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.storage.local_folder import LocalFolder
from tests.made import origin

SHAPES = {"embedding": (3000, 700), "none": (0, 3), "norm": (7,), "scalar": (), "head": (700, 3001)}
"""About 17 MB in float32: three chunks, whose borders lie within tensors."""


class Cut:
    """A file's bytes in pieces of some length, the first to a border of it."""

    def __init__(self, file: Path, length: int) -> None:
        self._data, self._length = bytearray(file.read_bytes()), length

    def pieces(self, start: int, size: int) -> Iterator[memoryview]:
        stop = start + size
        while start < stop:
            until = min(stop, (start // self._length + 1) * self._length)
            yield memoryview(self._data)[start:until]
            start = until


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
