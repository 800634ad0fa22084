"""Parts of `generation.py`: an ensemble of random weights, and one method for each measurement."""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

SIZES = {"toy": (2, 64, 2, 512), "124m": (12, 768, 12, 50_304), "350m": (24, 1024, 16, 50_304)}
"""Layers, width, heads, vocabulary."""
BLOCK_TOKENS = {"toy": 128, "124m": 1024, "350m": 1024}


class Bench:
    """The models, and one method for each part."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.experts, self.count = arguments.device, arguments.experts, arguments.prompts
        self.layers, self.width, self.heads, self.vocabulary = SIZES[arguments.model_size]
        self.block_tokens = BLOCK_TOKENS[arguments.model_size]
        self.new_tokens = arguments.new_tokens
        self.engines: dict[tuple[str, Any], Any] = {}
        self.models: list[Any] = []

    def parts(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """By name, in an order in which float32 comes first: bfloat16 casts the models for good."""
        return {
            "build": self.build,
            "correctness float32": self.correctness,
            "captured float32": lambda: self.speed("float32", repeats=1),
            "correctness bfloat16": lambda: self.correctness("bfloat16"),
            "captured bfloat16": lambda: self.speed("bfloat16", repeats=3),
            "breakdown": self.breakdown,
            "captured bfloat16, top-p 0.9": lambda: self.speed("bfloat16", top_p=0.9),
            "captured bfloat16, two experts": lambda: self.speed("bfloat16", top_k_experts=2),
            "captured bfloat16, one drawn expert": lambda: self.speed("bfloat16", draws_one_expert=True),
            "transformers generate, one expert": self.peer,
            "not captured bfloat16": lambda: self.speed("bfloat16", captures=False, share=8),
            "readers bfloat16": lambda: self.speed("bfloat16", way="readers", share=8, many=2),
            "scoring bfloat16": self.scoring,
            "memory": self.memory,
            "captured bfloat16, four times as many prompts": lambda: self.speed(
                "bfloat16", many=4 * self.count
            ),
            "kernels": self.kernels,
        }

    def build(self) -> dict[str, Any]:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = {
            "n_layer": self.layers,
            "n_embd": self.width,
            "n_head": self.heads,
            "n_positions": self.block_tokens,
        }
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(vocab_size=self.vocabulary, activation_function="gelu", **shape, **ends)
        for seed in range(self.experts):
            torch.manual_seed(seed)
            with torch.device(self.device):
                self.models.append(GPT2LMHeadModel(config).eval())
        parameters = sum(p.numel() for p in self.models[0].parameters())
        return {"parameters_each": parameters, "experts": self.experts}

    def engine(self, precision: str, rows: int, captures: bool = True, way: str | None = None) -> Any:
        """The one engine that is kept, or another in its place."""
        import torch

        from btm_cluster.equations.posterior import Posterior, uniform_prior
        from btm_cluster.language_model.engine import EnsembleEngine
        from btm_cluster.language_model.engine_opening import EngineSettings
        from btm_cluster.mixing.fitting import Mixing

        key = (precision, rows, captures, way)
        if key not in self.engines:
            self.engines.clear()
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            settings = EngineSettings(
                first_token=0,
                vocabulary=self.vocabulary,
                block_tokens=self.block_tokens,
                rows=rows,
                precision=precision,  # type: ignore[arg-type]
                device=self.device,
                way=way,  # type: ignore[arg-type]
                captures=captures,
            )
            gate = Mixing(uniform_prior(torch.zeros(self.experts, dtype=torch.float64)), Posterior("full"))
            start = time.monotonic()
            self.engines[key] = EnsembleEngine(self.models, gate, settings)
            print(f"  opened in {time.monotonic() - start:.1f} s; way {self.engines[key].way}", flush=True)
        return self.engines[key]

    def prompts(self, count: int, new_tokens: int, **asked: Any) -> list[Any]:
        """Prompts of lengths spread from 16 tokens on; one alone has 32."""
        import torch

        from btm_cluster.language_model.prompts import Prompt
        from btm_cluster.language_model.sampling import Sampling

        generator = torch.Generator().manual_seed(0)
        longest = min(256, self.block_tokens // 4)
        lengths = [16 + i * (longest - 16) // max(1, count - 1) for i in range(count)] if count > 1 else [32]
        drawn = {name: asked.pop(name) for name in ("temperature", "top_p") if name in asked}
        return [
            Prompt(
                torch.randint(self.vocabulary, (length,), generator=generator).tolist(),
                new_tokens,
                Sampling(random_seed=i, **drawn),
                **asked,
            )
            for i, length in enumerate(lengths)
        ]

    def clock(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds, and the result."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    def speed(
        self,
        precision: str,
        repeats: int = 1,
        share: int = 1,
        many: int | None = None,
        captures: bool = True,
        way: str | None = None,
        **asked: Any,
    ) -> dict[str, Any]:
        """Tokens per second for one prompt, and for many together.

        `share`: so much fewer tokens, for slow ways.
        """
        many = many or self.count
        engine = self.engine(precision, many, captures, way)
        figures: dict[str, Any] = {}
        for name, count in (("1", 1), ("many", many)):
            prompts = self.prompts(count, max(4, self.new_tokens // share), **asked)
            for _ in range(2 if captures else 1):  # run, captured; and replayed from the beginning on
                first, _ = self.clock(lambda prompts=prompts: engine.generate(prompts))
            rates = []
            for _ in range(repeats):
                seconds, written = self.clock(lambda prompts=prompts: engine.generate(prompts))
                rates.append(sum(len(one.tokens) for one in written) / seconds)
            reading, rows = self.clock(lambda prompts=prompts: engine.admit(prompts))
            for row in rows:
                engine.release(row)
            figures |= {"way": engine.way, "captures": engine.captures}
            figures |= {
                f"prompts_{name}": count,
                f"tokens_per_second_{name}": round(statistics.median(rates), 1),
            }
            figures |= {
                f"read_prompts_ms_{name}": round(reading * 1e3, 1),
                f"warm_up_s_{name}": round(first, 2),
            }
            print(f"  {count} prompts: {rates}", flush=True)
        return figures

    def correctness(self, precision: str = "float32") -> dict[str, Any]:
        """Captured steps against steps that are not, and both against scores of the same texts."""
        import torch

        prompts = self.prompts(4, min(64, self.new_tokens))
        figures: dict[str, Any] = {}
        tokens = []
        for captures in (False, True):
            engine = self.engine(precision, 4 if not captures else self.count, captures)
            engine.generate(prompts)
            written = engine.generate(prompts)
            tokens.append([one.tokens for one in written])
            scores = engine.score([[*p.tokens, *w.tokens] for p, w in zip(prompts, written, strict=True)])
            apart = [
                (torch.tensor([d.logp for d in w.drawn]) - s.logp_T[len(p.tokens) :]).abs().max().item()
                for p, w, s in zip(prompts, written, scores, strict=True)
            ]
            figures["captured_apart" if captures else "plain_apart"] = max(apart)
            row = engine.admit(prompts[:1])[0]
            figures["sums_to_1_but_for"] = abs(float(engine.log_probs(row).double().exp().sum()) - 1)
            engine.release(row)
        same = [a == b for one, other in zip(*tokens, strict=True) for a, b in zip(one, other, strict=True)]
        return figures | {"same_tokens": sum(same) / len(same)}

    def breakdown(self) -> dict[str, Any]:
        """Milliseconds of the two halves of a step, by themselves."""
        engine = self.engine("bfloat16", self.count)
        figures = {}
        for count in (1, self.count):
            rows = engine.admit(self.prompts(count, 200))
            for _ in range(4):
                engine.step()
            works = {
                "experts": lambda rows=rows: engine._decoder.read_on(rows, range(self.experts), 300),
                "one_expert": lambda rows=rows: engine._decoder.read_on(rows, [0], 300),
                "mixing": lambda rows=rows: engine._step.run(max(rows) + 1, False, False),
                "mixing_top_p": lambda rows=rows: engine._step.run(max(rows) + 1, True, False),
                "whole_step": engine.step,
            }
            for name, work in works.items():
                for _ in range(3):
                    self.inference(work)
                seconds, _ = self.clock(lambda work=work: [self.inference(work) for _ in range(20)])
                figures[f"{name}_ms_{count}"] = round(seconds / 20 * 1e3, 3)
            for row in rows:
                engine.release(row)
        return figures

    def inference(self, work: Callable[[], Any]) -> None:
        import torch

        with torch.inference_mode():
            work()

    def peer(self) -> dict[str, Any]:
        """transformers' `generate` with one expert in bfloat16, sampling, prompts of one length."""
        import torch

        self.engine("bfloat16", self.count)  # which casts the models
        model = self.models[0]
        figures: dict[str, Any] = {}
        for name, count in (("1", 1), ("many", self.count)):
            new = max(4, self.new_tokens // 2)
            ids = torch.randint(1, self.vocabulary, (count, 32), device=self.device)
            asked = {"do_sample": True, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}

            def call(ids: Any = ids, asked: dict[str, Any] = asked) -> Any:
                return model.generate(ids, attention_mask=torch.ones_like(ids), **asked)

            call()
            seconds, _ = self.clock(call)
            figures |= {
                f"prompts_{name}": count,
                f"tokens_per_second_{name}": round(count * new / seconds, 1),
            }
        return figures

    def scoring(self) -> dict[str, Any]:
        """Tokens per second that all experts score together."""
        engine = self.engine("bfloat16", self.count)
        texts = [prompt.tokens * 2 for prompt in self.prompts(self.count, 1)]
        tokens = sum(map(len, texts))
        figures = {"texts": len(texts), "tokens": tokens}
        for name, alternatives in (("", 0), ("_with_alternatives", 5)):
            first, *seconds = [
                self.clock(lambda n=alternatives: engine.score(texts, alternatives=n))[0] for _ in range(4)
            ]
            figures[f"first_call_s{name}"] = round(first, 3)
            figures[f"tokens_per_second{name}"] = round(tokens / statistics.median(seconds))
            print(f"  seconds{name}: {seconds}", flush=True)
        return figures

    def memory(self) -> dict[str, Any]:
        """Memory that the bfloat16 engine takes, in GB."""
        import torch

        engine = self.engine("bfloat16", self.count)
        figures = {f"{name}_gb": round(value / 1e9, 2) for name, value in engine.memory().items()}
        if self.device == "cuda":
            figures["most_allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return figures

    def kernels(self) -> dict[str, Any]:
        """The kernels that take most time of a step, for one prompt and for many."""
        if self.device != "cuda":
            return {"skipped": "needs a GPU"}
        from torch.profiler import ProfilerActivity, profile

        engine = self.engine("bfloat16", self.count)
        figures = {}
        for count in (1, self.count):
            rows = engine.admit(self.prompts(count, 100))
            for _ in range(4):
                engine.step()
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                for _ in range(4):
                    engine.step()
            for row in rows:
                engine.release(row)
            events = sorted(found.key_averages(), key=lambda one: -one.self_device_time_total)
            figures[f"kernels_per_step_{count}"] = sum(one.count for one in events) // 4
            for one in events[:14]:
                told = f"{one.self_device_time_total / 4:8.1f} us  {one.count // 4:5d} x  {one.key[:90]}"
                print(f"  {count}: {told}", flush=True)
        return figures
