"""Several averages made in one pass: the bits of each alone, and each piece of each model read once."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.averaging import AveragesTogether, average_models
from btm_cluster.language_model.stored_weights import ShardWriter, StoredWeights, TensorFiles, write_shards
from btm_cluster.language_model.tensor_files import Header
from btm_cluster.language_model.weighted_sums import SUMMED_AT_ONCE

SHAPES = {"large": (5, SUMMED_AT_ONCE // 2 + 3), "none": (0, 3), "norm": (7,), "scalar": ()}
WEIGHTS_AM = [[1 / 3, 1 / 3, 1 / 3], [0.2, 0.0, 0.8], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.1, 0.7, 0.2]]


def write_model(
    file: Path, random_seed: int, dtype: torch.dtype = torch.bfloat16, places: int = 5
) -> TensorFiles:
    generator = torch.Generator().manual_seed(random_seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    save_file(tensors | {"places": torch.arange(places)}, file)
    return TensorFiles([file])


class InPieces:
    """Weights read some elements at a time, which notes of what was asked."""

    def __init__(self, weights: TensorFiles) -> None:
        self._weights = weights
        self.header: Header = weights.header
        self.asked: Counter[tuple[str, int]] = Counter()

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        self.asked[name, 0] += 1
        return self._weights.read(name, device)

    def pieces(self, name: str, first: int, count: int) -> Iterator[torch.Tensor]:
        self.asked[name, first] += 1
        tensor = self._weights.read(name).reshape(-1)[first : first + count]
        yield from tensor.split(100_003)


def write_together(
    models: Sequence[StoredWeights],
    weights_AM: Sequence[Sequence[float]],
    folder: Path,
    threads: int = 1,
    shard_bytes: int | None = None,
) -> list[dict[str, bytes]]:
    """The files of each average."""
    together = AveragesTogether(models, weights_AM)
    with ThreadPoolExecutor(threads) as pool, ExitStack() as stack:
        writers = []
        for number, header in enumerate(together.headers):
            (folder / str(number)).mkdir(parents=True)
            writer = ShardWriter(header, folder / str(number), shard_bytes)
            writers.append(stack.enter_context(writer))
        done: list[int] = []
        together.write(writers, pool, threads, done.append)
    assert sum(done) == len(SHAPES) + 1
    return [{name: file.read_bytes() for name, file in writer.files.items()} for writer in writers]


def write_alone(
    models: Sequence[StoredWeights], weights_M: Sequence[float], folder: Path, shard_bytes: int | None = None
) -> dict[str, bytes]:
    pairs = [(model, weight) for model, weight in zip(models, weights_M, strict=True) if weight]
    folder.mkdir(parents=True)
    average = average_models([model for model, _ in pairs], [weight for _, weight in pairs])
    return {
        name: file.read_bytes()
        for name, file in write_shards(average, folder, shard_bytes=shard_bytes).items()
    }


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("dtypes", [[torch.bfloat16] * 3, [torch.float32, torch.bfloat16, torch.float16]])
@pytest.mark.parametrize("shard_bytes", [None, 300_000])
def test_averages_made_together_have_the_bytes_of_each_alone(
    dtypes: list[torch.dtype], threads: int, shard_bytes: int | None, tmp_path: Path
) -> None:
    models = [write_model(tmp_path / f"{i}", i, dtype) for i, dtype in enumerate(dtypes)]
    in_pieces = [InPieces(model) for model in models]
    found = write_together(in_pieces, WEIGHTS_AM, tmp_path / "together", threads, shard_bytes)
    whole = write_together(models, WEIGHTS_AM, tmp_path / "whole", threads, shard_bytes)
    for number, weights_M in enumerate(WEIGHTS_AM):
        alone = write_alone(models, weights_M, tmp_path / "alone" / str(number), shard_bytes)
        assert found[number] == whole[number] == alone, weights_M
    assert set(in_pieces[0].asked.values()) == {1}, "a piece was read twice"
    assert in_pieces[0].asked == in_pieces[1].asked == in_pieces[2].asked


def test_a_model_without_weight_has_no_say_in_the_type_that_an_average_is_stored_in(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16]
    models = [write_model(tmp_path / f"{i}", i, dtype) for i, dtype in enumerate(dtypes)]
    headers = AveragesTogether(models, [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]).headers
    assert [header["norm"]["dtype"] for header in headers] == ["F32", "BF16"]


def test_whole_numbers_must_be_the_same_in_the_models_that_have_weight(tmp_path: Path) -> None:
    models = [write_model(tmp_path / f"{i}", i) for i in range(2)]
    save_file(
        {name: models[0].read(name) + 1 for name in models[0].header if name != "__metadata__"},
        tmp_path / "2",
    )
    models.append(TensorFiles([tmp_path / "2"]))
    write_together(models, [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], tmp_path / "fits")
    with pytest.raises(IncompatibleError, match="1 others") as refused:
        write_together(models, [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], tmp_path / "differs")
    assert refused.value.found == "places: whole numbers that differ"


def test_other_tensors_are_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    models = [write_model(tmp_path / "0", 0), write_model(tmp_path / "1", 1, places=6)]
    with pytest.raises(IncompatibleError, match="cannot be averaged"):
        AveragesTogether(models, [[1.0, 0.0], [0.0, 1.0]])
