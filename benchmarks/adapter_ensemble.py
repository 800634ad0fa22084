"""An ensemble of LoRA experts over one base that writes, beside transformers' `generate` of one of its experts.

    python benchmarks/adapter_ensemble.py 0.5b --prompts 4 --new-tokens 32 --record      on CPU, about 5 minutes
    python benchmarks/adapter_ensemble.py 7b --prompts 16                                on a GPU

Shapes of Qwen2.5 with random weights, adapters of rank 16 beside all linear layers, prompts of 32 random tokens, no end
of text; bf16 on a GPU, float32 on a CPU. Told beside: the same ensemble with each expert read by itself, and one
expert alone by our engine. Tokens per second are new tokens over the time of a whole call, reading of the prompts
included; what is compiled or captured was so by a call before.
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from results import Result, finish, parse, this_machine, today
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from btm_cluster.equations.posterior import Posterior, uniform_prior
from btm_cluster.language_model import adapter_stacks
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.engine_opening import EngineSettings
from btm_cluster.language_model.lora import add_adapter, resolve_lora
from btm_cluster.language_model.prompts import Prompt
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.mixing.fitting import Mixing
from btm_cluster.plan import LoraPlan

SIZES = {  # width, feed-forward's width, layers, heads, heads of keys, vocabulary
    "toy": (64, 160, 2, 4, 2, 512),
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "7b": (3584, 18_944, 28, 28, 4, 152_064),
}
BLOCK_TOKENS, PROMPT_TOKENS, RANK = 1024, 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parse(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experts = _experts(asked.size, asked.experts, device)
    ids_BT = torch.randint(
        1, SIZES[asked.size][-1], (asked.prompts, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    rates = {"theirs": _rate(lambda: _generate(experts[0], ids_BT.to(device), asked.new_tokens), asked)}
    together = adapter_stacks.MOST_STACKED
    for who, some, most in (("one", 1, 1), ("apart", asked.experts, 1), ("ours", asked.experts, together)):
        adapter_stacks.MOST_STACKED = most
        rates[who] = _engine_rate(experts[:some], ids_BT, asked, device)
        print(who, f"{rates[who]:.2f} tokens/s", flush=True)
    finish([_row(asked, rates)], asked)


def _experts(size: str, count: int, device: str) -> list[PreTrainedModel]:
    width, inner, layers, heads, of_keys, vocabulary = SIZES[size]
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=of_keys,
        vocab_size=vocabulary,
        bos_token_id=None,
        eos_token_id=None,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        torch.manual_seed(0)
        base: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base.eval().requires_grad_(False)
    shared = (*base.parameters(), *base.buffers())
    experts = [copy.deepcopy(base, {id(tensor): tensor for tensor in shared}) for _ in range(count)]
    lora = resolve_lora(LoraPlan(rank=RANK), config.to_dict())
    for number, model in enumerate(experts):
        add_adapter(model, lora, number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.01
                parameter.data = drawn.to(device, dtype)
        model.eval().requires_grad_(False)
    return experts


def _engine_rate(
    models: list[PreTrainedModel], ids_BT: torch.Tensor, asked: argparse.Namespace, device: str
) -> float:
    settings = EngineSettings(
        first_token=0,
        vocabulary=SIZES[asked.size][-1],
        block_tokens=BLOCK_TOKENS,
        rows=asked.prompts,
        precision="bfloat16" if device == "cuda" else "float32",
        device=device,
        way="rows",
    )
    prior = uniform_prior(torch.zeros(len(models), dtype=torch.float64))
    engine = EnsembleEngine(models, Mixing(prior, Posterior("full")), settings)
    prompts = [
        Prompt(ids, asked.new_tokens, Sampling(random_seed=number))
        for number, ids in enumerate(ids_BT.tolist())
    ]
    return _rate(lambda: engine.generate(prompts), asked)


@torch.inference_mode()
def _generate(model: PreTrainedModel, ids_BT: torch.Tensor, new_tokens: int) -> None:
    count = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=True, pad_token_id=0, **count)


def _rate(run: Callable[[], Any], asked: argparse.Namespace) -> float:
    """New tokens per second of the best round, the first apart."""
    seconds = []
    for _ in range(1 + asked.rounds):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return float(asked.prompts * asked.new_tokens / min(seconds[1:]))


def _row(asked: argparse.Namespace, rates: dict[str, float]) -> Result:
    what = f"{asked.prompts} prompts by an ensemble of {asked.experts} LoRA experts of rank {RANK}"
    return Result(
        name="adapter-ensemble",
        what=f"{what}, Qwen2.5 shape of {asked.size}, {asked.new_tokens} new tokens each",
        machine=this_machine(),
        measured=today(),
        unit="tokens/s",
        better="higher",
        ours=rates["ours"],
        theirs=rates["theirs"],
        peer=f"transformers {transformers.__version__}, generate, one of the experts",
        goal=None,
        limit=None,
        limit_is=None,
        beside={
            "tokens/s with each expert read by itself": f"{rates['apart']:.3g}",
            "tokens/s of one expert by our engine": f"{rates['one']:.3g}",
        },
    )


if __name__ == "__main__":
    main()
