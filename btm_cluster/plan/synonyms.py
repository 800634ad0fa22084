"""Names that other tools have for what a plan says: where it stands here, and how to convert.

Knows names alone; `problems.py` shows them where a plan has one.
"""

from typing import NamedTuple


class Synonym(NamedTuple):
    """A field of the plan that another name stands for."""

    field: str
    """Its path in a plan, such as `training.updates`."""
    conversion: str = ""
    """How the value there becomes one here; empty: it is the same."""


_BATCH = Synonym(
    "training.blocks_per_domain_update",
    "blocks that an expert takes in an update; the seed takes so many of every domain",
)
_MICRO_BATCH = Synonym(
    "cluster.micro_batch_blocks", "blocks in a forward pass, of which an update takes as many as it needs"
)
_ACCUMULATION = Synonym(
    "training.blocks_per_domain_update",
    "the whole batch of an update; `cluster.micro_batch_blocks` says how much of it fits at once",
)
_UPDATES = Synonym("training.updates", "updates of the seed and then of an expert, together")
_EPOCHS = Synonym(
    "training.updates",
    "epochs times the tokens of a domain over block_tokens × blocks_per_domain_update; `btm plan` shows the "
    "passes over each text",
)
_RATE = Synonym("training.learning_rate")
_BLOCK = Synonym("training.block_tokens")
_WARMUP = Synonym("training.warmup_share", "warm-up steps over `training.updates`")
_SEED = Synonym("training.random_seed")
_CONFIG = Synonym("model.config", "such as {model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4}")
_PRETRAINED = Synonym("model.pretrained", "with the same name as `tokenizer.pretrained`")
_DOMAINS = Synonym("domains", "an expert for each entry of the list")
_LORA_RANK = Synonym("branching.lora.rank", "with `train: lora`")
_LORA_ALPHA = Synonym("branching.lora.alpha", "with `train: lora`")
_LORA_MODULES = Synonym("branching.lora.modules", "with `train: lora`; a list of names, or all-linear")
_CHECKPOINTS = Synonym("cluster.checkpoint_minutes", "in minutes")

SYNONYMS: dict[str, Synonym] = {
    "batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "global_batch_size": _BATCH,
    "per_device_train_batch_size": _MICRO_BATCH,
    "micro_batch_size": _MICRO_BATCH,
    "gradient_accumulation_steps": _ACCUMULATION,
    "epochs": _EPOCHS,
    "num_epochs": _EPOCHS,
    "num_train_epochs": _EPOCHS,
    "max_steps": _UPDATES,
    "num_steps": _UPDATES,
    "steps": _UPDATES,
    "train_steps": _UPDATES,
    "total_steps": _UPDATES,
    "max_iters": _UPDATES,
    "iterations": _UPDATES,
    "lr": _RATE,
    "max_lr": _RATE,
    "block_size": _BLOCK,
    "context_length": _BLOCK,
    "max_length": _BLOCK,
    "max_seq_len": _BLOCK,
    "max_seq_length": _BLOCK,
    "sequence_length": _BLOCK,
    "seq_len": _BLOCK,
    "seq_length": _BLOCK,
    "warmup_ratio": Synonym("training.warmup_share"),
    "warmup_iters": _WARMUP,
    "warmup_steps": _WARMUP,
    "adam_beta1": Synonym("training.betas", "both of them, such as [0.9, 0.95]"),
    "adam_beta2": Synonym("training.betas", "both of them, such as [0.9, 0.95]"),
    "adam_epsilon": Synonym("training.epsilon"),
    "wd": Synonym("training.weight_decay"),
    "grad_clip": Synonym("training.gradient_clip"),
    "max_grad_norm": Synonym("training.gradient_clip"),
    "clip_grad_norm": Synonym("training.gradient_clip"),
    "seed": _SEED,
    "data_seed": _SEED,
    "bf16": Synonym("cluster.precision", "bfloat16 or float32"),
    "fp16": Synonym("cluster.precision", "bfloat16 or float32; there is no float16"),
    "mixed_precision": Synonym("cluster.precision", "bfloat16 or float32"),
    "dtype": Synonym("cluster.precision", "bfloat16 or float32"),
    "torch_compile": Synonym("cluster.compile", "on, off or auto"),
    "gpus": Synonym("cluster.gpus_per_expert", "and `cluster.seed_gpus`"),
    "num_gpus": Synonym("cluster.gpus_per_expert", "and `cluster.seed_gpus`"),
    "n_gpus": Synonym("cluster.gpus_per_expert", "and `cluster.seed_gpus`"),
    "nproc_per_node": Synonym("cluster.gpus_per_expert", "and `cluster.seed_gpus`"),
    "r": _LORA_RANK,
    "lora_r": _LORA_RANK,
    "lora_rank": _LORA_RANK,
    "lora_alpha": _LORA_ALPHA,
    "target_modules": _LORA_MODULES,
    "lora_target_modules": _LORA_MODULES,
    "peft": Synonym("branching.train", "lora"),
    "adapter": Synonym("branching.train", "lora"),
    "save_steps": _CHECKPOINTS,
    "save_interval": _CHECKPOINTS,
    "checkpoint_interval": _CHECKPOINTS,
    "max_retries": Synonym("cluster.retries"),
    "num_experts": _DOMAINS,
    "n_experts": _DOMAINS,
    "experts": _DOMAINS,
    "datasets": _DOMAINS,
    "train_data": _DOMAINS,
    "eval_data": Synonym("targets", "texts that are evaluated and never trained on"),
    "val_data": Synonym("targets", "texts that are evaluated and never trained on"),
    "text_column": Synonym("domains[].field"),
    "content_field": Synonym("domains[].field"),
    "path": Synonym("domains[].text", "files or globs"),
    "files": Synonym("domains[].text", "files or globs"),
    "data_files": Synonym("domains[].text", "files or globs"),
    "hidden_size": _CONFIG,
    "d_model": _CONFIG,
    "dim": _CONFIG,
    "n_embd": _CONFIG,
    "n_layer": _CONFIG,
    "n_layers": _CONFIG,
    "num_layers": _CONFIG,
    "num_hidden_layers": _CONFIG,
    "n_head": _CONFIG,
    "n_heads": _CONFIG,
    "num_attention_heads": _CONFIG,
    "model_type": _CONFIG,
    "base_model": _PRETRAINED,
    "model_name": _PRETRAINED,
    "model_name_or_path": _PRETRAINED,
    "vocab_size": Synonym("tokenizer.train.vocabulary"),
    "output_dir": Synonym("store"),
    "out_dir": Synonym("store"),
    "save_dir": Synonym("store"),
    "merge_method": Synonym("merging", "and --weights of `btm merge`"),
    "price_per_hour": Synonym("cluster.price_per_gpu_hour"),
    "wandb_project": Synonym("tracking.wandb", "such as {project: forests}"),
    "report_to": Synonym("tracking", "such as {wandb: {project: forests}}"),
}
"""By the other name, in lower case with underscores."""


def synonym_of(name: str) -> Synonym | None:
    """The field that a name of another tool stands for."""
    return SYNONYMS.get(name.strip().lower().replace("-", "_"))
