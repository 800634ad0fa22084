"""The model and the updates that `btm init` chooses for some texts and a machine."""

import pytest

from btm_cluster.driver.sizing import (
    PASSES,
    SEED_SHARE,
    SIZES,
    TOKENS_PER_PARAMETER,
    Machine,
    ModelSize,
    Sizing,
    size_for,
)
from btm_cluster.language_model.configuration import full_config
from btm_cluster.language_model.model import count_parameters
from btm_cluster.plan import ModelPlan

LAPTOP = Machine("a laptop", 4, 40e9, on_gpus=False)
SERVER = Machine("a server", 64, 40e9, on_gpus=False)
H200 = Machine("an H200", 1, 0.35 * 989e12, on_gpus=True)


def tokens_per_text(sizing: Sizing) -> int:
    return sizing.updates * sizing.blocks_per_update * sizing.size.block_tokens


@pytest.mark.parametrize("machine", [LAPTOP, H200], ids=lambda machine: machine.name)
@pytest.mark.parametrize("millions", [0.01, 0.5, 5, 50, 500, 50_000])
@pytest.mark.parametrize("domains", [1, 4, 64])
def test_a_sizing_reads_no_text_too_often_and_takes_no_longer_than_it_may(
    millions: float, domains: int, machine: Machine
) -> None:
    tokens = {f"d{number}": int(1e6 * millions * (1 + number % 3)) for number in range(domains)}
    found = size_for(tokens, 1_000_000, machine)
    train = min(tokens.values()) * (1 - 2 * found.held_out_share)
    assert found.passes == pytest.approx(tokens_per_text(found) / train)
    assert found.updates >= 8
    if found.updates > 8:  # the fewest that are written
        assert found.passes <= PASSES
        assert found.hours <= machine.hours * 1.001
    if found.size != SIZES[0]:
        read = tokens_per_text(found) * (SEED_SHARE * domains + 1 - SEED_SHARE)
        assert read >= TOKENS_PER_PARAMETER * found.size.parameters
        assert found.held_out_share * min(tokens.values()) >= found.size.block_tokens


def test_more_text_and_a_faster_machine_make_larger_models() -> None:
    def chosen(millions: float, machine: Machine) -> str:
        return size_for({"a": int(1e6 * millions), "b": int(1e6 * millions)}, 0, machine).size.name

    assert chosen(0.5, LAPTOP) == chosen(0.5, H200) == "tiny"
    assert chosen(50, LAPTOP) == "tiny"
    assert chosen(50, SERVER) == "mini"
    assert chosen(2_000, H200) == "gpt3-125m"


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_parameters_of_a_size_are_those_of_its_model(size: ModelSize) -> None:
    shape = {"model_type": "gpt2", "n_layer": size.layers, "n_embd": size.width, "n_head": size.heads}
    plan = ModelPlan(preset=size.preset) if size.preset else ModelPlan(config=shape)  # type: ignore[arg-type]
    found = count_parameters(full_config(plan, size.vocabulary, size.block_tokens))[0]
    assert size.parameters == pytest.approx(found, rel=0.01)


def test_scores_are_paid_for_too() -> None:
    few, many = (size_for({"a": 10**8, "b": 10**8}, held_out, LAPTOP) for held_out in (10**6, 10**7))
    assert few.size == many.size
    assert tokens_per_text(many) < tokens_per_text(few)
