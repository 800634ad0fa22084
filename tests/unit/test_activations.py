"""The quicker form of GELU."""

import pytest
import torch
from torch.nn import functional

from btm_cluster.language_model.activations import gelu, quicken_gelu
from btm_cluster.language_model.configuration import full_config
from btm_cluster.language_model.model import build_model
from btm_cluster.plan import ModelPlan

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}


def test_compiled_values_and_slopes_are_those_of_float64_to_rounding() -> None:
    x = torch.linspace(-12, 12, 50_001).requires_grad_()
    exact = x.detach().double().requires_grad_()
    torch.manual_seed(0)
    slope = torch.randn(len(x))
    made, wanted = torch.compile(gelu, backend="aot_eager")(x), functional.gelu(exact)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-6, atol=5e-7)
    (found,), (right,) = (
        torch.autograd.grad(y, at, g) for y, at, g in ((made, x, slope), (wanted, exact, slope.double()))
    )
    torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=2e-6)


def test_values_in_bfloat16_are_computed_in_float32() -> None:
    x = torch.linspace(-5, 5, 10_001).bfloat16()
    made = torch.compile(gelu, backend="aot_eager")(x)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), functional.gelu(x.float()), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("function", "differs"), [("gelu", True), ("gelu_new", False)])
def test_a_compiled_model_with_exact_gelus_predicts_the_same(function: str, differs: bool) -> None:
    plan = ModelPlan(config={**GPT2, "activation_function": function})
    model = build_model(full_config(plan, vocabulary := 64, 16), 0)
    read = torch.arange(16)[None] % vocabulary
    plain = model(input_ids=read).logits
    quicken_gelu(model)
    assert torch.equal(model(input_ids=read).logits, plain), "what is not compiled is as it was"
    by_form = [module for module in model.modules() if module.forward is gelu]
    assert bool(by_form) == differs
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(input_ids=read).logits, plain, rtol=1e-5, atol=1e-6)
