"""`btm init`: a commented plan to begin with."""

from pathlib import Path

from btm_cluster.errors import UserError

STARTER_PLAN = """\
# A plan for one forest. `btm plan FILE` says what it would do and cost, `btm run FILE` does it.
# Paths are relative to the folder you run btm in. `btm schema` prints a JSON schema for your editor.
name: my-forest
store: ./forests/my-forest            # a folder

domains:                              # an expert each
  - name: news
    text: ./text/news/*.jsonl.zst     # .jsonl .parquet .txt, plain, .gz, .zst or .bz2; local or s3://; globs and lists
    field: text                       # the field of a row that holds the document
  - name: code
    text: ./text/code/**/*.py         # any other file is a document of its own
targets:                              # evaluated, never trained on: half development, half test text
  - {name: blog, text: ./text/blog.jsonl}

reading:
  bad_documents: refuse               # or skip: leave out, count and report lines that are broken or too long

tokenizer: {train: {vocabulary: 8192}}        # or {pretrained: name-or-folder}
model: {preset: gpt3-125m}                    # or {config: {model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4}}
                                              # or {pretrained: name-or-folder}, which then is the seed

training:
  block_tokens: 1024
  updates: 80000                      # the whole budget: seed updates, then expert updates
  seed_share: 0.5                     # small models want more: 0.75; leave it out where the model is pretrained
  blocks_per_domain_update: 128       # an expert's batch; the seed takes this times the number of domains
  learning_rate: 5.0e-4
branching: {learning_rate_scale: 1}   # the experts' over the seed's; 1 is the paper's, 2 made ensembles of small models better
baselines: [transformer-lm]           # the rival of the same compute, so that you know whether it was worth it

merging: {posterior: calibrated, prior: fitted, development_blocks: 100}    # posterior: gate learns more; with_seed: true

# expansion:                          # how `btm expand` adds what arrives in the store's inbox
#   accept_if: {development_perplexity_rise_at_most: 0.01}    # hold back experts that make the forest worse

cluster:                              # how, not what: changing this changes no result's name
  seed_gpus: 0                        # 0 trains on CPU
  gpus_per_expert: 0                  # 0.25 puts four experts on one GPU
  seed_cpus: 2
  cpus_per_expert: 1
  # concurrent_experts: 8
  # price_per_gpu_hour: 2.5
# tracking: {wandb: {project: forests}}         # or mlflow; TensorBoard's curves are always in the store's logs/
"""


def write_starter_plan(path: Path) -> None:
    """Writes it to a new file.

    Raises:
        UserError: the file is there already, or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} already exists", remedy="choose another name")
    try:
        path.write_text(STARTER_PLAN, encoding="utf-8")
    except OSError as exc:
        raise UserError(f"cannot write {path}", found=str(exc), remedy="choose another place") from exc
